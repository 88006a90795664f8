"""A traced trial: an arm's own schedule on the cell's own lanes and fabric, which write down every stage.

Legend: T rows on this rank, S step tokens, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch

from experiments.names import Device, Part
from workers.clock import SHARED, ClockOffset, offset_to_rank_0
from workers.fabrics import Fabric, GatherMarks
from workers.lanes import Join, Lanes
from workers.messages import ArmTrace, Fault, TraceCell, TraceReport, Variant
from workers.outcome import Outcome
from workers.prepared_cell import PreparedCell
from workers.splits.plan import GatherPlan
from workers.timeline import Timeline
from workers.verify import run_arm
from workers.wrapped_lanes import WrappedLanes, on_lanes

R = TypeVar("R")


class TracedJoin:
    """See `Join`."""

    def __init__(self, join: Join, lanes: Lanes, timeline: Timeline) -> None:
        self._join, self._lanes, self._timeline = join, lanes, timeline

    def enqueue(self) -> None:
        self._join.enqueue()

    def join(self) -> Any:
        self._join.enqueue()
        start = self._lanes.mark()
        result = self._join.join()
        self._timeline.add(Part.JOIN, self._lanes.lane, start, self._lanes.mark())
        return result


class TracedLanes(WrappedLanes):
    """Every clock is read on the lane that does the work, right before and right after it."""

    def __init__(self, lanes: Lanes, timeline: Timeline) -> None:
        super().__init__(lanes)
        self._timeline = timeline

    def stage(self, name: str, function: Callable[..., R], *args: Any) -> R:
        start = self._lanes.mark()
        result = self._lanes.stage(name, function, *args)
        self._timeline.add(name, self._lanes.lane, start, self._lanes.mark())
        return result

    def busy_wait(self, wait_us: float) -> None:
        start = self._lanes.mark()
        self._lanes.busy_wait(wait_us)
        self._timeline.add(Part.WAIT, self._lanes.lane, start, self._lanes.mark())

    def fork(self, work: Callable[[], Any], is_deferred: bool = False) -> TracedJoin:
        start = self._lanes.mark()
        join = self._lanes.fork(work, is_deferred)
        self._timeline.add(Part.FORK, self._lanes.lane, start, self._lanes.mark())
        return TracedJoin(join, self._lanes, self._timeline)


class TracedFabric:
    """See `Fabric`. The parts of a gather lie between the fabric's own marks, which the samples are made of too."""

    def __init__(self, fabric: Fabric, lanes: Lanes, timeline: Timeline) -> None:
        self._fabric, self._lanes, self._timeline = fabric, lanes, timeline

    @property
    def path(self) -> str:
        return self._fabric.path

    def gather(self, plan: GatherPlan, k_TD: torch.Tensor, out_SD: torch.Tensor) -> GatherMarks:
        """See `Fabric.gather`."""
        marks, lane = self._fabric.gather(plan, k_TD, out_SD), self._lanes.lane
        self._timeline.add(Part.PAD, lane, marks.arrival, marks.wire)
        self._timeline.add(Part.WIRE, lane, marks.wire, marks.wire_end)
        self._timeline.add(Part.RERANGE, lane, marks.wire_end, marks.done)
        return marks


def run_traced(cell: PreparedCell, arm: str, step: int, index: int, timeline: Timeline) -> Outcome:
    """One trial of an arm, as `PreparedCell.run` does it, with its spans on the timeline.

    Raises:
        ArmError: The schedule raised.
    """
    fabrics = cell.fabrics
    cell.fabrics = {by: TracedFabric(fabric, cell.lanes, timeline) for by, fabric in fabrics.items()}
    try:
        with on_lanes(cell, TracedLanes(cell.lanes, timeline)):
            return run_arm(cell, Variant(arm), step, index, cell.cell.scope)
    finally:
        cell.fabrics = fabrics


def trace_arms(cell: PreparedCell, request: TraceCell) -> TraceReport:
    """One traced trial of each arm on this rank, all on rank 0's clock. A collective, as trials are."""
    is_shared = request.shares_clock or cell.cell.device is Device.SIMULATED
    before = SHARED if is_shared else _offset(cell)
    traces, faults = [], []
    for arm in request.arms:
        index = cell.next_input()
        cell.correct(request.step, index, cell.settings_of[arm])
        timeline = Timeline(cell.rank, cell.lanes.us)
        outcome = run_traced(cell, arm, request.step, index, timeline)
        if problem := cell.problem(arm, outcome, request.step, index):
            faults.append(Fault(arm, "traced trial", problem))
        end_us = outcome.start_us + outcome.elapsed_us * cell.cell.layers
        traces.append(ArmTrace(arm, round(outcome.start_us * 1e3), round(end_us * 1e3), timeline.spans))
    clock = SHARED if is_shared else before.covering(_offset(cell))
    shifted = tuple(_shifted(trace, clock.offset_ns) for trace in traces)
    return TraceReport(cell.rank, shifted, tuple(faults), clock.offset_ns, clock.uncertainty_ns)


def _offset(cell: PreparedCell) -> ClockOffset:
    return offset_to_rank_0(cell.transport, cell.rank, cell.cell.cp_size)


def _shifted(trace: ArmTrace, by_ns: int) -> ArmTrace:
    spans = tuple(replace(span, start_ns=span.start_ns + by_ns, end_ns=span.end_ns + by_ns) for span in trace.spans)
    return replace(trace, start_ns=trace.start_ns + by_ns, end_ns=trace.end_ns + by_ns, spans=spans)
