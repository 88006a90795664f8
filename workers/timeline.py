"""A timeline: what ran where and when in one trial of one rank. It knows no torch: whoever draws it need not load any."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from experiments.names import Lane, Part


@dataclass(frozen=True)
class Span:
    """One stage of one rank, or a part of one.

    Attributes:
        stage: The stage's name, or a `Part`: `fork` and `join` on the main lane, `pad`, `wire` and `re-range` inside a gather.
        lane: Where it really ran.
        start_ns, end_ns: On the clock of the lanes; in a report, on rank 0's.
    """

    stage: str
    lane: Lane
    rank: int
    start_ns: int
    end_ns: int


class Timeline:
    """Collects the spans of one trial. Both lanes of a rank write to it."""

    def __init__(self, rank: int, us: Callable[[Any], float] = float) -> None:
        """`us` reads a mark of the lanes, once they are drained and before they meet again."""
        self._rank, self._us = rank, us
        self._marked: list[tuple[str, Lane, Any, Any]] = []

    def add(self, stage: str, lane: Lane, start: Any, end: Any) -> None:
        """Between two marks."""
        self._marked.append((stage, lane, start, end))

    @property
    def spans(self) -> tuple[Span, ...]:
        """By start; what encloses comes before what it holds, and parts of a gather that took no time are left out."""
        read = (
            (stage, lane, round(self._us(start) * 1e3), round(self._us(end) * 1e3)) for stage, lane, start, end in self._marked
        )
        in_gather = {Part.PAD, Part.WIRE, Part.RERANGE}
        spans = [
            Span(stage, lane, self._rank, start, end) for stage, lane, start, end in read if end > start or stage not in in_gather
        ]
        return tuple(sorted(spans, key=lambda span: (span.start_ns, -span.end_ns, span.stage in set(Part))))
