"""What people use instead, as decision rules over the same recorded samples.

A run of theirs times one version in one launch. Nobody interleaves arms inside a launch, so their samples of the two arms come from
different launches of a recording: two runs in a row, or rounds in turn.

Sources: Welch's t-test at 5 % (the habit). pytest-benchmark's `--benchmark-compare-fail=STAT:PERCENT`: whole per cents, and a regression only, so
slower is all that it can find (pytest_benchmark/utils.py; its documentation shows `min:5%`). asv's `continuous --interleave-rounds`: samples are
means of as many trials as fill 10 ms, at most 5 a round with 2 rounds; different when Mann-Whitney says p < 0.002 and the medians are apart by more
than `--factor`, 1.1 by default (asv/_stats.py, docs/source/benchmarks.rst).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from statistics import fmean, mean, median

import numpy as np

from service.calibrate.error_rates import End, Rate, rule_on
from service.calibrate.recording import LaunchSamples, Recording

Runs = Sequence[Sequence[float]]
"""Samples of one version, us, run by run."""

OWN = {"CP Lab": False, "CP Lab, clear of the band": True}
"""What counts as the service's word, on equal code as a false alarm: FASTER and SLOWER, by however much, or by more than the band."""
ASV_P = 0.002
ASV_SAMPLE_US = 10_000.0
ASV_SAMPLES = 5


class Said(IntEnum):
    """What a rule says of the other version."""

    FASTER = -1
    NOTHING = 0
    SLOWER = 1


@dataclass(frozen=True)
class Rival:
    """A rule over the runs of both versions."""

    name: str
    says: Callable[[Runs, Runs], Said]
    runs: int
    """Of each version that a decision takes."""
    is_in_turn: bool = False
    """Whether the versions' runs take turns; otherwise all of one come before those of the other."""


def welch(baseline: Runs, other: Runs) -> Said:
    """p < 0.05 over all samples, as if they were independent."""
    from scipy.stats import ttest_ind

    found = ttest_ind(_pooled(other), _pooled(baseline), equal_var=False)
    return Said(int(np.sign(found.statistic))) if found.pvalue < 0.05 else Said.NOTHING


def regression(stat: Callable[[Sequence[float]], float], pct: int) -> Callable[[Runs, Runs], Said]:
    """A statistic of the runs that rose by more than `pct` per cent."""

    def says(baseline: Runs, other: Runs) -> Said:
        return Said.SLOWER if stat(_pooled(other)) > (1 + pct / 100) * stat(_pooled(baseline)) else Said.NOTHING

    return says


def asv(factor: float, is_raw: bool = False) -> Callable[[Runs, Runs], Said]:
    """Different by Mann-Whitney, and medians apart by more than `factor`. `is_raw`: on every trial, not on asv's own samples."""

    def says(baseline: Runs, other: Runs) -> Said:
        from scipy.stats import mannwhitneyu

        ours, theirs = (_pooled(runs if is_raw else [asv_samples(run) for run in runs]) for runs in (baseline, other))
        change = median(theirs) / median(ours)
        if max(change, 1 / change) <= factor or mannwhitneyu(ours, theirs).pvalue >= ASV_P:
            return Said.NOTHING
        return Said.SLOWER if change > 1 else Said.FASTER

    return says


def asv_samples(run: Sequence[float]) -> list[float]:
    """The samples that asv would have taken of a round: means of trials that fill its sample time together, its number of them."""
    number = min(max(1, round(ASV_SAMPLE_US / median(run))), len(run))
    means = [fmean(run[at : at + number]) for at in range(0, len(run) - number + 1, number)]
    return means[:ASV_SAMPLES]


def _pooled(runs: Runs) -> list[float]:
    return [us for run in runs for us in run]


RIVALS = (
    Rival("two runs and a t-test", welch, 1),
    Rival("4 runs of each, pooled, and a t-test", welch, 4),
    Rival("pytest-benchmark, min:5%", regression(min, 5), 1),
    Rival("pytest-benchmark, mean:5%", regression(fmean, 5), 1),
    Rival("pytest-benchmark, min:3%", regression(min, 3), 1),
    Rival("pytest-benchmark, mean:3%", regression(fmean, 3), 1),
    Rival("pytest-benchmark, min:3%, 4 runs of each, pooled", regression(min, 3), 4),
    Rival("asv, 2 rounds in turn, factor 1.1", asv(1.1), 2, is_in_turn=True),
    Rival("asv, 2 rounds in turn, factor 1.025", asv(1.025), 2, is_in_turn=True),
    Rival("asv, 4 rounds in turn, factor 1.025", asv(1.025), 4, is_in_turn=True),
    Rival("asv's rule on raw trials, 4 rounds in turn, factor 1.025", asv(1.025, is_raw=True), 4, is_in_turn=True),
)


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        false_alarms: On equal code. A rival is asked about the baseline's launches of the very recordings in which it has to find the effect: noise
            differs between studies. The service is asked about A/A recordings, since pairing takes two arms in a launch.
        found: Of the planted effect, in the right direction.
        launches: Mean of a decision, both versions together.
        trials_s: Mean inside the samples that a decision uses.
    """

    name: str
    false_alarms: Rate
    found: Rate
    launches: float
    trials_s: float


def compare_rivals(equal: Sequence[Recording], slower: Sequence[Recording], indifference_pct: float) -> list[Row]:
    """The service's rule and its rivals on A/A recordings and on recordings of one planted slow-down."""
    ends = [rule_on(r.launches, r.looks, indifference_pct) for r in equal]
    planted = [(r.launches, rule_on(r.launches, r.looks, indifference_pct)) for r in slower]
    launches = [launch for recording in slower for launch in recording.launches]
    return [
        *(
            own_row(name, Rate(sum(end.claims(clearly) for end in ends), len(ends)), planted, clearly)
            for name, clearly in OWN.items()
        ),
        *(row_of(rival.name, rival, launches) for rival in RIVALS),
    ]


def row_of(name: str, rival: Rival, launches: Sequence[LaunchSamples]) -> Row:
    """A rival's line, from launches in a row with a slow-down planted in the other arm."""
    alarms = [said is not Said.NOTHING for said, _ in _decisions(rival, launches, is_equal=True)]
    found = _decisions(rival, launches, is_equal=False)
    return Row(
        name,
        Rate(sum(alarms), len(alarms)),
        Rate(sum(said is Said.SLOWER for said, _ in found), len(found)),
        2 * rival.runs,
        mean(seconds for _, seconds in found) if found else 0.0,
    )


def own_row(name: str, false_alarms: Rate, ends: Sequence[tuple[Sequence[LaunchSamples], End]], clearly: bool) -> Row:
    """The service's line, from the launches of comparisons with a planted slow-down and where the rule stopped on each; `clearly`: see `OWN`."""
    seconds = [
        sum(sum(launch.baseline_us) + sum(launch.other_us) for launch in launches[: end.launches]) / 1e6 for launches, end in ends
    ]
    return Row(
        name,
        false_alarms,
        Rate(sum(end.finds(clearly) for _, end in ends), len(ends)),
        mean(end.launches for _, end in ends) if ends else 0.0,
        mean(seconds) if seconds else 0.0,
    )


def _decisions(rival: Rival, launches: Sequence[LaunchSamples], is_equal: bool) -> list[tuple[Said, float]]:
    """What the rule says of every disjoint set of launches in a row that it takes, and the seconds of samples in it."""
    made = []
    size = 2 * rival.runs
    for start in range(0, len(launches) - size + 1, size):
        taken = launches[start : start + size]
        first, second = (taken[::2], taken[1::2]) if rival.is_in_turn else (taken[: rival.runs], taken[rival.runs :])
        baseline = [launch.baseline_us for launch in first]
        other = [launch.baseline_us if is_equal else launch.other_us for launch in second]
        made.append((rival.says(baseline, other), (sum(map(sum, baseline)) + sum(map(sum, other))) / 1e6))
    return made
