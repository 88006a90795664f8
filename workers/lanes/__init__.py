"""Lanes: where stages run. Every lane set has a main and a side lane; schedules are the same text on all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from experiments.names import Device, Lane
from experiments.spec.simulation import SimulationSpec

if TYPE_CHECKING:
    from workers.fabrics.transport import CollectiveTransport

R = TypeVar("R")


class Join(Protocol):
    """What a fork returns: waits for the side lane's work and gives its result."""

    def join(self) -> Any: ...


class Lanes(Protocol):
    """The main and the side lane of one rank."""

    @property
    def lane(self) -> Lane:
        """The lane that the caller runs on."""
        ...

    def now_us(self) -> float:
        """The time of the calling lane, in us: comparable within a host on the CPU, virtual when simulated."""
        ...

    def host_us(self) -> float | None:
        """The host's clock, us, on lanes whose work is enqueued by a host that runs ahead; None where the host does the work itself."""
        ...

    def meet(self, transport: CollectiveTransport) -> None:
        """Waits for the same call of every other rank."""
        ...

    def stage(self, name: str, function: Callable[..., R], *args: Any) -> R:
        """Runs one stage on the calling lane."""
        ...

    def busy_wait(self, wait_us: float) -> None:
        """Keeps the main lane busy for that long with nothing."""
        ...

    def fork(self, work: Callable[[], Any]) -> Join:
        """Starts `work` on the side lane, after everything that the main lane has done so far."""
        ...

    def drain(self) -> None:
        """Waits until both lanes are idle."""
        ...

    def close(self) -> None: ...


def make_lanes(device: Device, simulation: SimulationSpec, timeout_s: float) -> Lanes:
    """The lanes of a device. A join that takes longer than `timeout_s` raises TimeoutError."""
    from workers.lanes.cpu import CpuLanes
    from workers.lanes.simulated import SimulatedLanes

    registry: dict[Device, Callable[[], Lanes]] = {
        Device.CPU: lambda: CpuLanes(timeout_s),
        Device.SIMULATED: lambda: SimulatedLanes(simulation),
    }
    return registry[device]()
