"""A cell's traced trials in the Chrome trace event format, which Perfetto and chrome://tracing open.

One process for each rank and one thread for each lane. The arms stand one after another, as they ran.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from experiments.names import Lane, Part
from workers.messages import ArmTrace, TraceReport
from workers.timeline import Span

GATHER = "gather"
_CATEGORIES = {
    GATHER: "gather",
    Part.PAD: "gather",
    Part.WIRE: "gather",
    Part.RERANGE: "gather",
    Part.FORK: "lane",
    Part.JOIN: "lane",
    Part.WAIT: "lane",
}


def chrome_trace(reports: Sequence[TraceReport], hosts: Sequence[str], about: Mapping[str, Any]) -> str:
    """The trace as JSON; times in microseconds since the first traced trial began.

    Args:
        reports: Of every rank, in rank order.
        hosts: Of every rank, for the names of the processes.
        about: What the trace is of; kept under `otherData`.
    """
    origin_ns = min(arm.start_ns for report in reports for arm in report.arms)
    events: list[dict[str, Any]] = []
    numbers = itertools.count(1)
    for report, host in zip(reports, hosts, strict=True):
        events += _names(report.rank, host)
        for arm in report.arms:
            events += _trial(report.rank, arm, origin_ns, numbers)
    clock = {
        "clock": "that of rank 0",
        "uncertainty_us": {f"rank {report.rank}": report.uncertainty_ns / 1e3 for report in reports},
    }
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms", "otherData": {**about, **clock}}, indent=1) + "\n"


def process_id(rank: int) -> int:
    """Not 0, which viewers keep for the idle process."""
    return 100 * (rank + 1)


def thread_id(rank: int, lane: Lane) -> int:
    """Unique among all ranks, since viewers look threads up by it alone; the main lane's is its process's, as on Linux."""
    return process_id(rank) + (lane is Lane.SIDE)


def _names(rank: int, host: str) -> list[dict[str, Any]]:
    def name(what: str, lane: Lane, **args: str | int) -> dict[str, Any]:
        return {"ph": "M", "name": what, "pid": process_id(rank), "tid": thread_id(rank, lane), "args": args}

    events = [
        name("process_name", Lane.MAIN, name=f"rank {rank} on {host}"),
        name("process_sort_index", Lane.MAIN, sort_index=rank),
    ]
    for position, lane in enumerate(Lane):
        events += [name("thread_name", lane, name=f"{lane} lane"), name("thread_sort_index", lane, sort_index=position)]
    return events


def _trial(rank: int, trace: ArmTrace, origin_ns: int, numbers: Iterator[int]) -> list[dict[str, Any]]:
    """The arm's own slice, its spans inside it, and an arrow from each launch point to its gather.

    `numbers`: what is left for arrows, whose ids are whole numbers in Perfetto.
    """

    def slice_of(name: str, category: str, lane: Lane, start_ns: int, end_ns: int) -> dict[str, Any]:
        return {
            **{"ph": "X", "name": name, "cat": category, "pid": process_id(rank), "tid": thread_id(rank, lane)},
            **{"ts": (start_ns - origin_ns) / 1e3, "dur": (end_ns - start_ns) / 1e3, "args": {"arm": trace.arm}},
        }

    events = [slice_of(trace.arm, "trial", Lane.MAIN, trace.start_ns, trace.end_ns)]
    events += [slice_of(s.stage, _CATEGORIES.get(s.stage, "stage"), s.lane, s.start_ns, s.end_ns) for s in trace.spans]
    for fork, gather, _ in crossings(trace):
        arrow = {"name": "launch", "cat": "lane", "id": next(numbers), "pid": process_id(rank)}
        events += [
            {**arrow, "ph": "s", "tid": thread_id(rank, fork.lane), "ts": (fork.start_ns - origin_ns) / 1e3},
            {**arrow, "ph": "f", "bp": "e", "tid": thread_id(rank, gather.lane), "ts": (gather.start_ns - origin_ns) / 1e3},
        ]
    return events


def crossings(trace: ArmTrace) -> list[tuple[Span, Span, Span]]:
    """Of each gather on the side lane: its launch point, itself, and the join that waited for it."""
    forks = [span for span in trace.spans if span.stage == Part.FORK]
    joins = [span for span in trace.spans if span.stage == Part.JOIN]
    found = []
    for gather in trace.spans:
        if gather.stage == GATHER and gather.lane is Lane.SIDE:
            # A schedule may fork work of its own, too.
            fork = max((span for span in forks if span.start_ns <= gather.start_ns), key=lambda span: span.start_ns)
            join = min((span for span in joins if span.end_ns >= gather.end_ns), key=lambda span: span.end_ns)
            found.append((fork, gather, join))
    return found
