"""Schedules that are `serial` over symmetric memory with one thing of its protocol broken, or put to the test.

Ranks alone run them: a test names them as `tests.workers.mutants_of_wires:NAME` in an arm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from workers.fabrics.symmetric import SymmetricFabric
from workers.schedules import serial

SLOW_READ_US = 4000.0
"""Far longer than a layer of a small cell: by then a peer that does not wait has sent the next layer's keys."""

Result = tuple[torch.Tensor, torch.Tensor]


def _fabric_of(exchange: Any) -> SymmetricFabric:
    fabric = exchange._fabric
    assert isinstance(fabric, SymmetricFabric)
    return fabric


@contextmanager
def _last_rank_reads_slowly(exchange: Any) -> Iterator[None]:
    """Between the wire and the re-range, on its lane."""
    fabric = _fabric_of(exchange)
    rows = fabric._rows

    def late(*of: torch.Tensor) -> None:
        if exchange._plan.rank == exchange._plan.cp_size - 1:
            fabric.lanes.hold_back(SLOW_READ_US)
        rows.reorder(*of)

    fabric._rows = rows._replace(reorder=late)
    try:
        yield
    finally:
        fabric._rows = rows


@contextmanager
def _without(name: str, instead: Callable[..., None], of: Any) -> Iterator[None]:
    setattr(of, name, instead)
    try:
        yield
    finally:
        delattr(of, name)


def slow_reader(ix: Any, shard: Any, exchange: Any) -> Result:
    """Nothing is broken: whoever is slow to read must still find its own layer's keys."""
    with _last_rank_reads_slowly(exchange):
        return serial(ix, shard, exchange)


def slow_reader_of_one_buffer(ix: Any, shard: Any, exchange: Any) -> Result:
    """The buffers are not taken in turn."""
    fabric = _fabric_of(exchange)
    for shape in fabric._shapes.values():
        shape.turn()  # and the gather's own turn is back at the same buffer
    with _last_rank_reads_slowly(exchange):
        return serial(ix, shard, exchange)


def without_barrier(ix: Any, shard: Any, exchange: Any) -> Result:
    """Nobody waits until the peers' rows have come."""
    with _without("meet", lambda shape: None, _fabric_of(exchange)):
        return serial(ix, shard, exchange)
