"""Lanes: where stages run. Every lane set has a main and a side lane; schedules are the same text on all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar

import torch

from experiments.names import Device, Lane
from experiments.spec.simulation import SimulationSpec

if TYPE_CHECKING:
    from workers.fabrics.transport import CollectiveTransport

R = TypeVar("R")

Mark: TypeAlias = Any
"""A point in the time of the lane that set it. `Lanes.us` reads it once the lanes are drained: a device may not have come to it before."""


class Join(Protocol):
    """What a fork returns."""

    def enqueue(self) -> None:
        """Hands over work that was forked with `is_deferred`; nothing to do where that runs already."""
        ...

    def join(self) -> Any:
        """Waits for the side lane's work on the main lane, and gives its result."""
        ...


class Lanes(Protocol):
    """The main and the side lane of one rank."""

    @property
    def device(self) -> torch.device:
        """Where the tensors of a stage are."""
        ...

    @property
    def lane(self) -> Lane:
        """The lane that the caller runs on."""
        ...

    def mark(self) -> Mark:
        """Marks the time of the calling lane."""
        ...

    def us(self, mark: Mark) -> float:
        """When a lane came to a mark, in us: comparable within a host on the CPU, within a rank on a GPU, virtual when simulated. Only between
        `drain` and the next `meet`."""
        ...

    def host_us(self) -> float | None:
        """The host's clock, us, on lanes whose work is enqueued by a host that runs ahead; None where the host does the work itself."""
        ...

    def meet(self, transport: CollectiveTransport) -> None:
        """Waits for the same call of every other rank. Marks set before are void."""
        ...

    def stage(self, name: str, function: Callable[..., R], *args: Any) -> R:
        """Runs one stage on the calling lane."""
        ...

    def busy_wait(self, wait_us: float) -> None:
        """Keeps the main lane busy for that long with nothing."""
        ...

    def hold_back(self, delay_us: float) -> None:
        """Keeps the calling lane from its next work for that long, without use of what other lanes need."""
        ...

    def fork(self, work: Callable[[], Any], is_deferred: bool = False) -> Join:
        """Starts `work` on the side lane, after everything that the main lane has done so far.

        `is_deferred`: a host that runs ahead of its device enqueues it only at `Join.enqueue` or `Join.join`, behind what it enqueues in between;
        the point that it waits for stays this one. Where the host does the work itself there is no such order, and it starts at once.
        """
        ...

    def capture(self, work: Callable[[], R]) -> tuple[Callable[[], None], R]:
        """`work` as one unit that is enqueued at once, and what it returned; on lanes whose device knows such units."""
        ...

    def drain(self) -> None:
        """Waits until both lanes are idle."""
        ...

    def close(self) -> None: ...


def make_lanes(device: Device, simulation: SimulationSpec, timeout_s: float) -> Lanes:
    """The lanes of a device. A join that takes longer than `timeout_s` raises TimeoutError."""
    return LANES[device](simulation, timeout_s)


def _cpu(simulation: SimulationSpec, timeout_s: float) -> Lanes:
    from workers.lanes.cpu import CpuLanes

    return CpuLanes(timeout_s)


def _cuda(simulation: SimulationSpec, timeout_s: float) -> Lanes:
    from workers.lanes.cuda import CudaLanes

    return CudaLanes(timeout_s)


def _simulated(simulation: SimulationSpec, timeout_s: float) -> Lanes:
    from workers.lanes.simulated import SimulatedLanes

    return SimulatedLanes(simulation)


LANES: dict[Device, Callable[[SimulationSpec, float], Lanes]] = {
    Device.CPU: _cpu,
    Device.CUDA: _cuda,
    Device.SIMULATED: _simulated,
}
