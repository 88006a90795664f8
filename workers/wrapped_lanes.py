"""A cell's lanes with something around them, for the trials that nobody times: traced ones, and those with a lane held back.

A timed trial pays nothing: it runs on the cell's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from experiments.names import Lane
from workers.fabrics.transport import CollectiveTransport
from workers.indexer.indexer import Indexer
from workers.lanes import Join, Lanes, Mark
from workers.prepared_cell import PreparedCell

R = TypeVar("R")


class WrappedLanes:
    """See `Lanes`. Hands everything on; who wraps them overrides what matters to it."""

    def __init__(self, lanes: Lanes) -> None:
        self._lanes = lanes

    @property
    def device(self) -> torch.device:
        return self._lanes.device

    @property
    def lane(self) -> Lane:
        return self._lanes.lane

    def mark(self) -> Mark:
        return self._lanes.mark()

    def us(self, mark: Mark) -> float:
        return self._lanes.us(mark)

    def host_us(self) -> float | None:
        return self._lanes.host_us()

    def meet(self, transport: CollectiveTransport) -> None:
        self._lanes.meet(transport)

    def stage(self, name: str, function: Callable[..., R], *args: Any) -> R:
        return self._lanes.stage(name, function, *args)

    def busy_wait(self, wait_us: float) -> None:
        self._lanes.busy_wait(wait_us)

    def hold_back(self, delay_us: float) -> None:
        self._lanes.hold_back(delay_us)

    def fork(self, work: Callable[[], Any], is_deferred: bool = False) -> Join:
        return self._lanes.fork(work, is_deferred)

    def capture(self, work: Callable[[], R]) -> tuple[Callable[[], None], R]:
        return self._lanes.capture(work)

    def drain(self) -> None:
        self._lanes.drain()

    def close(self) -> None:
        self._lanes.close()


class LateLanes(WrappedLanes):
    """One of the lanes starts late on what follows every fork.

    With the side lane late, whoever does not wait for it reads poison. With the main lane late, whoever hands over what the main lane has yet to
    write sends what was there before.
    """

    def __init__(self, lanes: Lanes, late: Lane, delay_us: float) -> None:
        super().__init__(lanes)
        self._late, self._delay_us = late, delay_us

    def fork(self, work: Callable[[], Any], is_deferred: bool = False) -> Join:
        if self._late is Lane.MAIN:
            join = self._lanes.fork(work, is_deferred)
            self._lanes.hold_back(self._delay_us)
            return join

        def late_work() -> Any:
            self._lanes.hold_back(self._delay_us)
            return work()

        return self._lanes.fork(late_work, is_deferred)


@contextmanager
def on_lanes(cell: PreparedCell, lanes: Lanes) -> Iterator[None]:
    """Meanwhile the cell runs on other lanes around its own. Its layers stay the objects that schedules know; its graphs are put away, since lanes
    are part of one."""
    runs_on: list[PreparedCell | Indexer] = [cell, *(layer for layers in cell.layers.values() for layer in layers)]
    own, graphs = cell.lanes, cell.graphs
    cell.graphs = {}
    try:
        for each in runs_on:
            each.lanes = lanes
        yield
    finally:
        for each in runs_on:
            each.lanes = own
        cell.graphs = graphs
