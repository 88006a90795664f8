"""The published effect: the geometric paired time_ratio of an arm to the baseline, with an interval over launches.

Evidence is what the launches say, one log ratio each; a comparison is that evidence read at a level, which depends on the looks that were
planned (`looks`) and on the other comparisons of the sweep (`family`).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from service.judge.interval import Interval, one_sided_p, standard_error, t_quantile, two_sided_p
from service.judge.location import shift
from service.judge.looks import Looks
from service.judge.samples import Sample

POWER = 0.8
SAME_ERROR = 0.05
"""Each of the two one-sided tests of SAME: together one 90 % interval (Schuirmann, J. Pharmacokinet. Biopharm. 15, 1987)."""


@dataclass(frozen=True)
class Comparison:
    """arm / baseline, below 1 is faster.

    Attributes:
        ratio: Of the samples' times (drained: the slowest rank of each step), at `confidence`.
        ratio_90: The interval that SAME is read from: 90 % for a single comparison looked at once.
        ratio_min: Fastest rank of each step, at `confidence`: a winner needs both to agree.
        p_value: Of equal times; holds under the planned looks, not yet corrected for the other comparisons.
        detectable_pct: The smallest effect that this many launches would have shown with 80 % power at this level, per cent.
        confidence: What `ratio` holds with, corrected for the other comparisons; the looks are paid for inside it.
        launches, pairs: What the ratio rests on.
    """

    ratio: Interval
    ratio_90: Interval
    ratio_min: Interval
    p_value: float
    detectable_pct: float
    confidence: float
    launches: int
    pairs: int


@dataclass(frozen=True)
class Evidence:
    """One arm beside the baseline in one cell, before it is read.

    Attributes:
        logs: log(arm / baseline) of the samples' times, one value a launch; at least two.
        logs_min: The same of the fastest ranks.
        share: The share of the error that this look may spend.
        pairs: Pairs of samples behind the values.
    """

    logs: tuple[float, ...]
    logs_min: tuple[float, ...]
    share: float
    pairs: int

    @cached_property
    def _mean(self) -> float:
        return math.fsum(self.logs) / len(self.logs)

    @cached_property
    def _error(self) -> float:
        return standard_error(self.logs)

    @property
    def p_value(self) -> float:
        """Of equal times, valid at any planned look: a 1 - p interval at this look just touches 1."""
        return min(1.0, two_sided_p(self._mean, self._error, len(self.logs) - 1) / self.share)

    @property
    def p_claim(self) -> float:
        """Of there being nothing to claim: FASTER and SLOWER need the slowest and the fastest ranks, so the larger of both p-values, and 1
        where they point apart (an intersection-union test). What discoveries are counted by: counted by the slowest ranks alone, claims that
        the fastest then strike out would have paid for the level of those that stay."""
        mean_min = math.fsum(self.logs_min) / len(self.logs_min)
        if mean_min * self._mean < 0:
            return 1.0
        p_min = two_sided_p(mean_min, standard_error(self.logs_min), len(self.logs_min) - 1) / self.share
        return min(1.0, max(self.p_value, p_min))

    def p_same(self, indifference_pct: float) -> float:
        """Of an effect outside the indifference band (two one-sided tests), valid at any planned look."""
        if indifference_pct == 0:
            return 1.0
        degrees = len(self.logs) - 1
        below = one_sided_p(math.log1p(indifference_pct / 100) - self._mean, self._error, degrees)
        above = one_sided_p(self._mean - math.log1p(-indifference_pct / 100), self._error, degrees)
        return min(1.0, max(below, above) / self.share)

    def read(self, level: float, level_same: float) -> Comparison:
        """The comparison at the error `level` (two-sided) and, for SAME, `level_same` (each of two sides)."""
        degrees = len(self.logs) - 1
        quantile = t_quantile(1 - level * self.share, degrees)
        detectable = (quantile + t_quantile(2 * POWER - 1, degrees)) * self._error
        return Comparison(
            ratio=_around(self.logs, quantile),
            ratio_90=_around(self.logs, t_quantile(1 - 2 * level_same * self.share, degrees)),
            ratio_min=_around(self.logs_min, quantile),
            p_value=self.p_value,
            detectable_pct=100 * math.expm1(min(detectable, 700.0)),
            confidence=1 - level,
            launches=len(self.logs),
            pairs=self.pairs,
        )


def _around(logs: Sequence[float], quantile: float) -> Interval:
    mean, half = math.fsum(logs) / len(logs), quantile * standard_error(logs)
    return Interval(mean, mean - half, mean + half).map_exp()


def evidence_of(samples: Sequence[Sample], arm: str, baseline: str, looks: Looks) -> Evidence | None:
    """The evidence on an arm, or None when fewer than two launches hold a pair."""
    logs, pairs = launch_log_ratios(samples, arm, baseline, "time_us")
    logs_min, _ = launch_log_ratios(samples, arm, baseline, "min_us")
    if len(logs) < 2:
        return None
    return Evidence(tuple(logs), tuple(logs_min), looks.share(len(logs)), pairs)


def launch_log_ratios(samples: Sequence[Sample], arm: str, baseline: str, reduction: str) -> tuple[list[float], int]:
    """One value a launch, and the number of pairs behind them all.

    A pair is an arm's and the baseline's trial in the same row of a block, milliseconds apart. A launch's value is the shift between the
    logarithms of both columns: drift slower than a few rows cancels, and a few preempted trials do not speak for all.
    """
    rows: dict[tuple[int, int, int], dict[str, float]] = defaultdict(dict)
    for sample in samples:
        if sample.kind == "arms" and sample.variant in (arm, baseline):
            rows[(sample.launch, sample.block, sample.row)][sample.variant] = math.log(getattr(sample, reduction))
    launches: dict[int, list[tuple[int, dict[str, float]]]] = defaultdict(list)
    for (launch, block, _), logs in sorted(rows.items()):
        if len(logs) == 2:
            launches[launch].append((block, logs))
    values = [
        shift([logs[baseline] for _, logs in pairs], [logs[arm] for _, logs in pairs], [block for block, _ in pairs])
        for pairs in launches.values()
    ]
    return values, sum(map(len, launches.values()))
