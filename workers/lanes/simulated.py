"""Simulated lanes: a virtual clock over planted stage times. Stages see meta tensors, so shapes are real and arithmetic is not.

The planted truth: while the side lane is in flight, main-lane work advances at rate 1 / (1 + main_slowdown); the side lane keeps
its own pace; fork and join cost the main lane fork_us and join_us. The clocks of the ranks are aligned where a trial begins, and from there on they
only meet in gathers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from experiments.names import Lane
from experiments.spec.simulation import SimulationSpec
from workers.lanes import Mark

if TYPE_CHECKING:
    from workers.fabrics.transport import CollectiveTransport

R = TypeVar("R")


class SimulatedJoin:
    def __init__(self, lanes: SimulatedLanes, result: Any, end_us: float) -> None:
        self._lanes, self._result, self._end_us = lanes, result, end_us

    def enqueue(self) -> None:
        """It runs already."""

    def join(self) -> Any:
        self._lanes.join_at(self._end_us)
        return self._result


class SimulatedLanes:
    """See `Lanes`; time is virtual, and a mark is that time in us."""

    device = torch.device("meta")

    def __init__(self, simulation: SimulationSpec) -> None:
        self.simulation = simulation
        self.planted_us: dict[str, float] = {name.removesuffix("_us"): us for name, us in simulation.model_dump().items()}
        """By stage; what is planted by a cell instead of the spec (its filler) joins them."""
        self._main_us = 0.0
        self._side_us = 0.0
        self._in_side = False

    @property
    def lane(self) -> Lane:
        return Lane.SIDE if self._in_side else Lane.MAIN

    def mark(self) -> float:
        return self._side_us if self._in_side else self._main_us

    def us(self, mark: Mark) -> float:
        return float(mark)

    def spend(self, work_us: float) -> None:
        """Advances the calling lane by that much work."""
        if self._in_side:
            self._side_us += work_us
            return
        slow = 1 + self.simulation.main_slowdown
        under_gather_us = max(0.0, self._side_us - self._main_us)
        if work_us * slow <= under_gather_us:
            self._main_us += work_us * slow
        else:
            self._main_us += under_gather_us + (work_us - under_gather_us / slow)

    def pass_until(self, end_us: float) -> None:
        """Advances the calling lane to a time that is not in its past."""
        if self._in_side:
            self._side_us = end_us
        else:
            self._main_us = end_us

    def host_us(self) -> None:
        return None

    def meet(self, transport: CollectiveTransport) -> None:
        self.pass_until(max(transport.all_gather_us(self.mark())))

    def stage(self, name: str, function: Callable[..., R], *args: Any) -> R:
        if name != "gather":  # the fabric knows when it ends: that depends on the other ranks
            self.spend(self.planted_us[name])
        return function(*args)

    def busy_wait(self, wait_us: float) -> None:
        self._main_us += wait_us

    def hold_back(self, delay_us: float) -> None:
        self.pass_until(self.mark() + delay_us)

    def fork(self, work: Callable[[], Any], is_deferred: bool = False) -> SimulatedJoin:
        self._main_us += self.simulation.fork_us
        self._side_us = max(self._side_us, self._main_us)
        self._in_side = True
        try:
            result = work()
        finally:
            self._in_side = False
        return SimulatedJoin(self, result, self._side_us)

    def join_at(self, end_us: float) -> None:
        """The main lane goes on when the side lane's work has ended."""
        self._main_us = max(self._main_us, end_us) + self.simulation.join_us

    def capture(self, work: Callable[[], R]) -> tuple[Callable[[], None], R]:
        raise AssertionError("specs allow graphs on a GPU alone")

    def drain(self) -> None:
        self._main_us = self._side_us = max(self._main_us, self._side_us)

    def close(self) -> None:
        pass
