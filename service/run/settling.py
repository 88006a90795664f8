"""Settling: a launch's trials are timed once they have stopped getting faster (caches, lazy allocations, compilation) or slower (heat)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from statistics import median

from workers.messages import BlockReport

TREND = 0.05
"""Change of the trials' times between the last two blocks, as a share, that is no trend: pairs cancel what is left of a drift. The verdict never
rests on this figure, so it can be as coarse as few trials are."""


class Settling:
    """Collects a launch's warm-up blocks of one cell."""

    def __init__(self, arms: Sequence[str]) -> None:
        self._arms = set(arms)
        self._blocks: list[dict[str, list[float]]] = []

    def add(self, reports: Sequence[BlockReport]) -> None:
        """One block of warming up, as every rank saw it."""
        times_us: dict[str, list[float]] = defaultdict(list)
        for rows in zip(*(report.rows for report in reports), strict=True):
            if rows[0].variant in self._arms:
                times_us[rows[0].variant].append(max(row.elapsed_us for row in rows))
        self._blocks.append(dict(times_us))

    @property
    def num_blocks(self) -> int:
        return len(self._blocks)

    @property
    def trend(self) -> float:
        """log(last block / the one before), the median over arms of their medians; infinite before there are two."""
        if len(self._blocks) < 2:
            return math.inf
        before, last = self._blocks[-2:]
        return median(
            math.log(median(last[arm]) / median(before[arm])) for arm in self._arms if before.get(arm) and last.get(arm)
        )

    @property
    def is_settled(self) -> bool:
        return abs(self.trend) <= math.log1p(TREND)
