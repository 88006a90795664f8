"""A timeline: what ran where and when in one trial of one rank. It knows no torch: whoever draws it need not load any."""

from __future__ import annotations

from dataclasses import dataclass

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
    """Collects the spans of one trial. Both lanes of a rank write to it; each adds a span when that has ended."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._spans: list[Span] = []

    def add(self, stage: str, lane: Lane, start_us: float, end_us: float) -> None:
        self._spans.append(Span(stage, lane, self._rank, round(start_us * 1e3), round(end_us * 1e3)))

    @property
    def spans(self) -> tuple[Span, ...]:
        """By start; what encloses comes before what it holds."""
        return tuple(sorted(self._spans, key=lambda span: (span.start_ns, -span.end_ns, span.stage in set(Part))))
