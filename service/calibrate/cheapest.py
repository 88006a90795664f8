"""Time to resolve an effect: the least seconds of trials in which each rule finds it as often as is asked, without crying more often than is allowed.

Every rule is given its best: which threshold, how many runs and how many trials of each are chosen for it afterwards, on the very samples it is
counted on. A plan that was to be fixed in advance would do no better.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from service.calibrate.error_rates import Rate, rule_on
from service.calibrate.recording import LaunchSamples, Recording
from service.calibrate.rivals import OWN, Rival, Row, asv, own_row, regression, row_of, welch
from service.judge.looks import Looks

POWER, LEVEL = 0.95, 0.05
"""Found at least so often, false alarms at most so often: shares of the decisions that the samples allow."""
MIN_DECISIONS = 20
"""Fewer say nothing of 95 %."""
TRIALS = (5, 10, 15, 20, 25, 30, 40, 50, 100)
"""Of a launch, the first ones."""
RUNS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 20)
"""Of each version."""
OWN_LOOKS = (Looks(5, 5), Looks(5, 8), Looks(8, 8))
"""The service's plans: fewer launches than five are refused, and A/A recordings have eight (those of a study with one look after eight: always)."""


def resolves(plan: Row) -> bool:
    """Whether it does what is asked."""
    return plan.found.share >= POWER and plan.false_alarms.share <= LEVEL


@dataclass(frozen=True)
class Cheapest:
    """A rule at its best: the line of its cheapest plan that resolves the effect, named by the plan, or of the one that finds most without crying too
    often; None where each cries, or can be asked too seldom."""

    name: str
    best: Row | None


def families() -> dict[str, list[Rival]]:
    """The rivals' rules with every threshold that is tried; how many runs each takes is not settled yet."""
    thresholds = range(1, 6)
    factors = (1.01, 1.025, 1.05, 1.1)
    return {
        "t-test": [Rival("", welch, 1)],
        "pytest-benchmark, min:P%": [Rival(f"min:{p}%", regression(min, p), 1) for p in thresholds],
        "pytest-benchmark, mean:P%": [Rival(f"mean:{p}%", regression(fmean, p), 1) for p in thresholds],
        "asv, rounds in turn": [Rival(f"factor {f}", asv(f), 1, is_in_turn=True) for f in factors],
        "asv's rule on raw trials, rounds in turn": [
            Rival(f"factor {f}", asv(f, is_raw=True), 1, is_in_turn=True) for f in factors
        ],
    }


def cheapest(equal: Sequence[Recording], slower: Sequence[Recording], indifference_pct: float) -> list[Cheapest]:
    """The service and its rivals, each at its best. `equal`: A/A recordings; `slower`: those of one planted slow-down."""
    launches = [launch for recording in slower for launch in recording.launches]
    rows = [Cheapest(name, _best(_own_plans(equal, slower, indifference_pct, clearly))) for name, clearly in OWN.items()]
    rows += [Cheapest(name, _best(_plans(family, launches))) for name, family in families().items()]
    return rows


def _best(plans: Iterator[Row]) -> Row | None:
    quiet = [plan for plan in plans if plan.false_alarms.share <= LEVEL]
    if resolving := [plan for plan in quiet if resolves(plan)]:
        return min(resolving, key=lambda plan: plan.trials_s)
    return max(quiet, key=lambda plan: (plan.found.share, -plan.trials_s), default=None)


def _plans(family: Sequence[Rival], launches: Sequence[LaunchSamples]) -> Iterator[Row]:
    for trials in _lengths(launches):
        shortened = [launch.first(trials) for launch in launches]
        for rival in (replace(rule, runs=runs) for rule in family for runs in RUNS):
            plan = ", ".join(filter(None, (rival.name, f"{rival.runs} runs of each", f"{trials} trials")))
            if len(shortened) // (2 * rival.runs) >= MIN_DECISIONS:
                yield row_of(plan, rival, shortened)


def _own_plans(equal: Sequence[Recording], slower: Sequence[Recording], indifference_pct: float, clearly: bool) -> Iterator[Row]:
    recorded = [launch for recording in (*equal, *slower) for launch in recording.launches]
    for trials in _lengths(recorded):
        quiet, slow = ([[launch.first(trials) for launch in r.launches] for r in group] for group in (equal, slower))
        for looks in OWN_LOOKS:
            # A comparison that was decided early lacks the launches that shorter trials might have asked for: it counts as an alarm.
            alarms = sum(
                len(launches) < looks.last or rule_on(launches, looks, indifference_pct).claims(clearly) for launches in quiet
            )
            plan = f"looks after {' or '.join(map(str, looks.planned))} launches, {trials} pairs"
            planted = [(launches, looks) for launches in slow]
            yield own_row(plan, Rate(alarms, len(quiet)), planted, indifference_pct, clearly)


def _lengths(launches: Sequence[LaunchSamples]) -> list[int]:
    """The numbers of trials that every launch has."""
    fewest = min((len(launch.baseline_us) for launch in launches), default=0)
    return [trials for trials in TRIALS if trials <= fewest]
