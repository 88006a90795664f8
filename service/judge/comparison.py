"""The published effect: the geometric paired time_ratio of an arm to the baseline, with an interval over launches."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from service.judge.interval import Interval, mean_interval, standard_error, t_quantile
from service.judge.samples import Sample

POWER = 0.8
SAME_CONFIDENCE = 0.90
"""Two one-sided tests at 5 % are one 90 % interval (Schuirmann, J. Pharmacokinet. Biopharm. 15, 1987)."""


@dataclass(frozen=True)
class Comparison:
    """arm / baseline, below 1 is faster.

    Attributes:
        ratio: Slowest rank of each step, at the spec's confidence (shared by the arms of the cell).
        ratio_90: The same at 90 %, for SAME.
        ratio_min: Fastest rank of each step: a winner needs both to agree.
        detectable_pct: The smallest effect that this many launches would have shown with 80 % power, per cent.
        launches, pairs: What the ratio rests on.
    """

    ratio: Interval
    ratio_90: Interval
    ratio_min: Interval
    detectable_pct: float
    launches: int
    pairs: int


def launch_log_ratios(samples: Sequence[Sample], arm: str, baseline: str, reduction: str) -> list[float]:
    """One value a launch: the mean over its blocks of the median log ratio of the pairs in a block.

    A pair is an arm's and the baseline's trial in the same row of a block, milliseconds apart: drift slower than a row cancels. The
    median inside a block keeps one preempted trial from speaking for all.
    """
    rows: dict[tuple[int, int, int], dict[str, float]] = defaultdict(dict)
    for sample in samples:
        if sample.kind == "arms":
            rows[(sample.launch, sample.block, sample.row)][sample.variant] = getattr(sample, reduction)
    blocks: dict[tuple[int, int], list[float]] = defaultdict(list)
    for (launch, block, _), times in sorted(rows.items()):
        if arm in times and baseline in times:
            blocks[(launch, block)].append(math.log(times[arm] / times[baseline]))
    launches: dict[int, list[float]] = defaultdict(list)
    for (launch, _), ratios in blocks.items():
        launches[launch].append(median(ratios))
    return [math.fsum(values) / len(values) for _, values in sorted(launches.items())]


def compare(samples: Sequence[Sample], arm: str, baseline: str, confidence: float, num_arms: int = 1) -> Comparison | None:
    """The comparison, or None when fewer than two launches hold a pair.

    `num_arms`: how many arms of the cell are compared with the baseline. They share the error (Bonferroni), so that a cell of equal
    arms is called different as seldom as a cell of one.
    """
    confidence, confidence_same = (1 - (1 - level) / num_arms for level in (confidence, SAME_CONFIDENCE))
    logs = launch_log_ratios(samples, arm, baseline, "max_us")
    logs_min = launch_log_ratios(samples, arm, baseline, "min_us")
    if len(logs) < 2:
        return None
    degrees = len(logs) - 1
    detectable = (t_quantile(confidence, degrees) + t_quantile(2 * POWER - 1, degrees)) * standard_error(logs)
    return Comparison(
        ratio=mean_interval(logs, confidence).map_exp(),
        ratio_90=mean_interval(logs, confidence_same).map_exp(),
        ratio_min=mean_interval(logs_min, confidence).map_exp(),
        detectable_pct=100 * math.expm1(min(detectable, 700.0)),
        launches=len(logs),
        pairs=sum(s.kind == "arms" and s.variant == arm for s in samples),
    )
