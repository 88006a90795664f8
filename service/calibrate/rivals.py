"""What people use instead, as decision rules over the same recorded samples.

A run of theirs times one version in one launch. Nobody interleaves arms inside a launch, so their samples of the two arms come from
different launches of a recording: two runs in a row, or rounds in turn.

Sources: Welch's t-test at 5 % (the habit); pytest-benchmark's `--benchmark-compare-fail=STAT:PERCENT`, whose documentation shows `min:5%`;
asv's `continuous --interleave-rounds`: Mann-Whitney at p < 0.002 (asv/_stats.py, is_different) and a ratio beyond `--factor`, 1.1 by default.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from service.calibrate.error_rates import Rate, first_alarm
from service.calibrate.recording import LaunchSamples, Recording

Runs = Sequence[tuple[float, ...]]
"""Samples of one version, us, run by run."""

ASV_P = 0.002


@dataclass(frozen=True)
class Rival:
    """A rule: says from the runs of both versions whether they differ."""

    name: str
    differ: Callable[[Runs, Runs], bool]
    runs: int
    """Of each version that a decision takes."""
    is_in_turn: bool = False
    """Whether the versions' runs take turns; otherwise all of one come before those of the other."""


def welch(baseline: Runs, other: Runs) -> bool:
    """p < 0.05 over all samples, as if they were independent."""
    from scipy.stats import ttest_ind

    return bool(ttest_ind(_pooled(baseline), _pooled(other), equal_var=False).pvalue < 0.05)


def threshold(stat: Callable[[Sequence[float]], float], pct: float) -> Callable[[Runs, Runs], bool]:
    """A statistic of the runs that moved by more than `pct` per cent, either way."""

    def differ(baseline: Runs, other: Runs) -> bool:
        change = stat(_pooled(other)) / stat(_pooled(baseline))
        return bool(max(change, 1 / change) > 1 + pct / 100)

    return differ


def asv(factor: float) -> Callable[[Runs, Runs], bool]:
    """Different by Mann-Whitney, and medians apart by more than `factor`."""

    def differ(baseline: Runs, other: Runs) -> bool:
        from scipy.stats import mannwhitneyu

        ours, theirs = _pooled(baseline), _pooled(other)
        change = median(theirs) / median(ours)
        return bool(max(change, 1 / change) > factor and mannwhitneyu(ours, theirs).pvalue < ASV_P)

    return differ


def _pooled(runs: Runs) -> list[float]:
    return [us for run in runs for us in run]


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


RIVALS = (
    Rival("two runs and a t-test", welch, 1),
    Rival("two runs, four times as long, and a t-test", welch, 4),
    Rival("pytest-benchmark, min:5%", threshold(min, 5), 1),
    Rival("pytest-benchmark, mean:5%", threshold(_mean, 5), 1),
    Rival("pytest-benchmark, mean:2.5%", threshold(_mean, 2.5), 1),
    Rival("asv, 2 rounds in turn, factor 1.1", asv(1.1), 2, is_in_turn=True),
    Rival("asv, 2 rounds in turn, factor 1.025", asv(1.025), 2, is_in_turn=True),
    Rival("asv, 4 rounds in turn, factor 1.025", asv(1.025), 4, is_in_turn=True),
)


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        false_alarms: On A/A recordings.
        found: Of the planted effect.
        launches: Of a decision, both versions together.
        trials_s: Inside the samples that a decision uses.
    """

    name: str
    false_alarms: Rate
    found: Rate
    launches: float
    trials_s: float


def compare_rivals(equal: Sequence[Recording], slower: Sequence[Recording], indifference_pct: float) -> list[Row]:
    """The service's rule and its rivals on A/A recordings and on recordings of one planted effect."""
    rows = [_own_row(equal, slower, indifference_pct)]
    for rival in RIVALS:
        alarms, found = _decisions(rival, equal), _decisions(rival, slower)
        used = [s for _, s in found]
        rows.append(
            Row(
                rival.name,
                Rate(sum(d for d, _ in alarms), len(alarms)),
                Rate(sum(d for d, _ in found), len(found)),
                2 * rival.runs,
                median(used) if used else 0.0,
            )
        )
    return rows


def _decisions(rival: Rival, recordings: Sequence[Recording]) -> list[tuple[bool, float]]:
    """(differs, seconds of samples) for every disjoint set of launches that a decision of this rule takes."""
    made = []
    for recording in recordings:
        size = 2 * rival.runs
        for start in range(0, len(recording.launches) - size + 1, size):
            launches = recording.launches[start : start + size]
            # In turn: the baseline in the even ones, the other in the odd ones; a longer run is several launches of one version in a row.
            first, second = _halves(rival, launches)
            baseline, other = [launch.baseline_us for launch in first], [launch.other_us for launch in second]
            made.append((rival.differ(baseline, other), (sum(map(sum, baseline)) + sum(map(sum, other))) / 1e6))
    return made


def _halves(rival: Rival, launches: Sequence[LaunchSamples]) -> tuple[Sequence[LaunchSamples], Sequence[LaunchSamples]]:
    if rival.is_in_turn:
        return launches[::2], launches[1::2]
    return launches[: rival.runs], launches[rival.runs :]


def _own_row(equal: Sequence[Recording], slower: Sequence[Recording], indifference_pct: float) -> Row:
    alarms = [first_alarm(r.launches, r.looks, indifference_pct) is not None for r in equal]
    ends = [first_alarm(r.launches, r.looks, indifference_pct) for r in slower]
    taken = [end if end is not None else len(r.launches) for end, r in zip(ends, slower, strict=True)]
    seconds = [
        sum(sum(launch.baseline_us) + sum(launch.other_us) for launch in r.launches[:n]) / 1e6
        for n, r in zip(taken, slower, strict=True)
    ]
    return Row(
        "CP Lab",
        Rate(sum(alarms), len(alarms)),
        Rate(sum(end is not None for end in ends), len(ends)),
        median(taken) if taken else 0.0,
        median(seconds) if seconds else 0.0,
    )
