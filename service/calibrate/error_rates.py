"""Error rates from recordings: how often the service's rule claims what is not there, and misses what is."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from experiments.errors import UserError
from experiments.names import Verdict
from service.calibrate.recording import LaunchSamples, Recording, evidence_after
from service.judge.comparison import SAME_ERROR, Comparison, Evidence
from service.judge.looks import Looks
from service.judge.verdict import judge

LEVEL = 0.05


@dataclass(frozen=True)
class Rate:
    """`hits` of `count`, with the exact 95 % interval (Clopper and Pearson, Biometrika 26, 1934)."""

    hits: int
    count: int

    @property
    def share(self) -> float:
        return self.hits / self.count if self.count else 0.0

    @property
    def bounds(self) -> tuple[float, float]:
        from scipy.stats import binomtest

        if not self.count:
            return 0.0, 1.0
        found = binomtest(self.hits, self.count).proportion_ci(0.95, "exact")
        return float(found.low), float(found.high)

    @property
    def words(self) -> str:
        low, high = self.bounds
        return f"{self.hits} of {self.count} ({self.share:.1%}, 95 % interval {low:.1%} to {high:.1%})"


@dataclass(frozen=True)
class FalseAlarms:
    """Of A/A comparisons: intervals that exclude 1, whatever the band; FASTER or SLOWER clear of it; and SAME."""

    excluding: Rate
    claims: Rate
    same: Rate


def false_alarms(recordings: Sequence[Recording], indifference_pct: float) -> FalseAlarms:
    """As the service judged them when they were measured; how clear of the band they were, by the rule as it is now."""
    count = len(recordings)
    return FalseAlarms(
        Rate(sum(r.excludes_1 for r in recordings), count),
        Rate(sum(rule_on(r.launches, r.looks, indifference_pct).claims(clearly=True) for r in recordings), count),
        Rate(sum(r.verdict is Verdict.SAME for r in recordings), count),
    )


def rerun(recordings: Sequence[Recording], times: int, indifference_pct: float, seed: int = 0) -> FalseAlarms:
    """The rule, looks and stops included, on comparisons put together anew from the recorded launches.

    Launches are drawn with replacement over all comparisons, and each one's two equal arms trade names at random: exchangeable under the
    truth that they are equal, so every drawing is an A/A comparison.
    """
    rng = random.Random(seed)
    looks = recordings[0].looks
    if any(r.looks != looks for r in recordings):
        raise UserError("FILE: these recordings were made under different plans of looks: summarise each plan by itself")
    pool = [(launch.log_ratio, launch.log_ratio_min) for r in recordings for launch in r.launches]
    ends = [_run_rule(_Drawn(pool, rng), looks, indifference_pct) for _ in range(times)]
    return FalseAlarms(
        Rate(sum(end.comparison.ratio.excludes(1) for end in ends), times),
        Rate(sum(end.claims(clearly=True) for end in ends), times),
        Rate(sum(end.verdict is Verdict.SAME for end in ends), times),
    )


@dataclass(frozen=True)
class End:
    """Where the rule stopped."""

    launches: int
    verdict: Verdict
    may_be_small: bool
    comparison: Comparison

    def claims(self, clearly: bool) -> bool:
        """FASTER or SLOWER; clear of the band, if that is asked."""
        return self.verdict in (Verdict.FASTER, Verdict.SLOWER) and not (clearly and self.may_be_small)

    def finds(self, clearly: bool) -> bool:
        """Claims what was planted: a slow-down."""
        return self.verdict is Verdict.SLOWER and self.claims(clearly)


class _Drawn:
    """An endless comparison: launches as the rule asks for them."""

    def __init__(self, pool: Sequence[tuple[float, float]], rng: random.Random) -> None:
        self._pool, self._rng = pool, rng
        self._logs: list[float] = []
        self._logs_min: list[float] = []

    def first(self, launches: int, looks: Looks) -> Evidence:
        while len(self._logs) < launches:
            (log, log_min), sign = self._rng.choice(self._pool), self._rng.choice((1, -1))
            self._logs.append(sign * log)
            self._logs_min.append(sign * log_min)
        return Evidence(tuple(self._logs), tuple(self._logs_min), looks.share(launches), launches)


def _run_rule(drawn: _Drawn, looks: Looks, indifference_pct: float) -> End:
    """Look by look until a verdict stands, as the controller does for a sweep of one comparison."""
    for launches in looks.planned:
        comparison = drawn.first(launches, looks).read(LEVEL, SAME_ERROR)
        judgement = judge(comparison, indifference_pct)
        if judgement.verdict is not Verdict.UNRESOLVED:
            break
    return End(launches, judgement.verdict, judgement.may_be_small, comparison)


@dataclass(frozen=True)
class PowerPoint:
    """Comparisons with one planted slow-down.

    Attributes:
        found: SLOWER, by however much.
        clear: SLOWER, clear of the band.
        covered: The interval holds the planted ratio, as it was in that comparison.
        detectable_pct: Median of the smallest effect that the service said it could have seen.
        inside_s, starting_s, launches: Medians of a comparison.
    """

    planted_pct: float
    found: Rate
    clear: Rate
    covered: Rate
    detectable_pct: float
    inside_s: float
    starting_s: float
    launches: float


def power_curve(recordings: Sequence[Recording], indifference_pct: float) -> list[PowerPoint]:
    """By planted size."""
    points = []
    for pct in sorted({r.planted_pct for r in recordings}):
        group = [r for r in recordings if r.planted_pct == pct]
        points.append(
            PowerPoint(
                planted_pct=pct,
                found=Rate(sum(r.verdict is Verdict.SLOWER for r in group), len(group)),
                clear=Rate(sum(rule_on(r.launches, r.looks, indifference_pct).finds(clearly=True) for r in group), len(group)),
                covered=Rate(sum(r.ratio[1] <= math.exp(r.true_log_ratio) <= r.ratio[2] for r in group), len(group)),
                detectable_pct=median(r.detectable_pct for r in group),
                inside_s=median(r.inside_s for r in group),
                starting_s=median(r.starting_s for r in group),
                launches=median(len(r.launches) for r in group),
            )
        )
    return points


def rule_on(launches: Sequence[LaunchSamples], looks: Looks, indifference_pct: float, level: float = LEVEL) -> End:
    """Where the rule stops on recorded launches: at a verdict, or with the last of them. `level`: of FASTER and SLOWER."""
    for count in (n for n in looks.planned if n <= len(launches)):
        comparison = evidence_after(launches[:count], looks).read(level, SAME_ERROR)
        judgement = judge(comparison, indifference_pct)
        if judgement.verdict is not Verdict.UNRESOLVED:
            break
    return End(count, judgement.verdict, judgement.may_be_small, comparison)
