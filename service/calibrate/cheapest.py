"""Time to resolve an effect: the least seconds of trials in which each rule finds it as often as is asked, without crying more often than is allowed.

Every rule is given its best: which threshold (the service: which confidence), how many runs and how many trials of each are chosen for it afterwards,
on the very samples it is counted on. A plan that was to be fixed in advance would do no better.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from service.calibrate.error_rates import Rate, rule_on
from service.calibrate.recording import LaunchSamples, Recording
from service.calibrate.rivals import OWN, Rival, Row, Runs, Said, asv, own_row, regression, row_of, welch
from service.judge.looks import Looks

POWER = 0.95
"""Found at least so often: a share of the decisions that the samples allow."""
LIMITS = (0.05, 0.01)
"""False alarms at most so often, of the decisions too."""
MIN_DECISIONS = 20
"""Fewer say nothing of 95 %."""
TRIALS = (5, 6, 7, 8, 10, 12, 15, 20, 25, 30, 40, 50, 100)
"""Of a launch, the first ones."""
RUNS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 20)
"""Of each version."""
OWN_LOOKS = (Looks(5, 5), Looks(5, 8), Looks(8, 8), Looks(5, 13), Looks(8, 13), Looks(8, 20))
"""The service's plans: fewer launches than five are refused."""
OWN_LEVELS = (0.05, 0.02, 0.01)
"""The service's threshold: the error of `measurement.confidence`."""


@dataclass(frozen=True)
class Cheapest:
    """A rule at its best: of its plans that cry in at most `limit` of the decisions, the line of the one that resolves the effect soonest, or that
    finds most; None where each cries more often, or can be asked too seldom."""

    name: str
    limit: float
    best: Row | None

    @property
    def resolves(self) -> bool:
        """Whether it does what is asked."""
        return self.best is not None and self.best.found.share >= POWER


def as_they_come() -> dict[str, list[Rival]]:
    """The rivals' rules with the thresholds of their defaults and documentation; how many runs each takes is not settled yet."""
    return {
        "t-test": _in_either_order("", welch),
        "pytest-benchmark, min:5%": _in_either_order("", regression(min, 5)),
        "pytest-benchmark, mean:5%": _in_either_order("", regression(fmean, 5)),
        "asv, rounds in turn, factor 1.1": [Rival("", asv(1.1), 1, is_in_turn=True)],
    }


def tuned() -> dict[str, list[Rival]]:
    """The same with every threshold that is tried, and a rule that no tool offers: asv's on every trial."""
    thresholds = range(1, 6)
    factors = (1.01, 1.015, 1.02, 1.025, 1.03, 1.035, 1.05, 1.1)
    return {
        "pytest-benchmark, min:P%": [rival for p in thresholds for rival in _in_either_order(f"min:{p}%", regression(min, p))],
        "pytest-benchmark, mean:P%": [
            rival for p in thresholds for rival in _in_either_order(f"mean:{p}%", regression(fmean, p))
        ],
        "asv, rounds in turn, any factor": [Rival(f"factor {f}", asv(f), 1, is_in_turn=True) for f in factors],
        "asv's rule on raw trials, rounds in turn": [
            Rival(f"factor {f}", asv(f, is_raw=True), 1, is_in_turn=True) for f in factors
        ],
    }


def _in_either_order(name: str, says: Callable[[Runs, Runs], Said]) -> list[Rival]:
    """All runs of one version and then those of the other, or in turn: that is up to whoever runs the tool."""
    return [Rival(name, says, 1), Rival(", ".join(filter(None, (name, "in turn"))), says, 1, is_in_turn=True)]


def cheapest(equal: Sequence[Recording], slower: Sequence[Recording], indifference_pct: float) -> list[Cheapest]:
    """The service and its rivals, each at its best under each limit. `equal`: A/A recordings; `slower`: those of one planted slow-down; each of a
    number of launches that was fixed in advance, since all of them are taken in a row and cut anew."""
    quiet, slow = ([launch for recording in group for launch in recording.launches] for group in (equal, slower))
    plans = {name: list(_own_plans(quiet, slow, indifference_pct, clearly)) for name, clearly in OWN.items()}
    plans |= {name: list(_plans(family, slow)) for name, family in (as_they_come() | tuned()).items()}
    return [Cheapest(name, limit, _best(rows, limit)) for limit in LIMITS for name, rows in plans.items()]


def _best(plans: Iterable[Row], limit: float) -> Row | None:
    quiet = [plan for plan in plans if plan.false_alarms.share <= limit]
    if resolving := [plan for plan in quiet if plan.found.share >= POWER]:
        return min(resolving, key=lambda plan: plan.trials_s)
    return max(quiet, key=lambda plan: (plan.found.share, -plan.trials_s), default=None)


def _plans(family: Sequence[Rival], launches: Sequence[LaunchSamples]) -> Iterator[Row]:
    for trials in _lengths(launches):
        shortened = [launch.first(trials) for launch in launches]
        for rival in (replace(rule, runs=runs) for rule in family for runs in RUNS):
            plan = ", ".join(filter(None, (rival.name, f"{rival.runs} runs of each", f"{trials} trials")))
            if len(shortened) // (2 * rival.runs) >= MIN_DECISIONS:
                yield row_of(plan, rival, shortened)


def _own_plans(
    equal: Sequence[LaunchSamples], slower: Sequence[LaunchSamples], indifference_pct: float, clearly: bool
) -> Iterator[Row]:
    for trials in _lengths([*equal, *slower]):
        quiet, slow = ([launch.first(trials) for launch in group] for group in (equal, slower))
        for looks in OWN_LOOKS:
            equal_sets, slower_sets = _in_sets(quiet, looks.last), _in_sets(slow, looks.last)
            if min(len(equal_sets), len(slower_sets)) < MIN_DECISIONS:
                continue
            for level in OWN_LEVELS:
                alarms = sum(rule_on(launches, looks, indifference_pct, level).claims(clearly) for launches in equal_sets)
                found = [(launches, rule_on(launches, looks, indifference_pct, level)) for launches in slower_sets]
                plan = f"looks after {', '.join(map(str, looks.planned))} launches, {trials} pairs, {1 - level:.0%}"
                yield own_row(plan, Rate(alarms, len(equal_sets)), found, clearly)


def _in_sets(launches: Sequence[LaunchSamples], size: int) -> list[Sequence[LaunchSamples]]:
    return [launches[start : start + size] for start in range(0, len(launches) - size + 1, size)]


def _lengths(launches: Sequence[LaunchSamples]) -> list[int]:
    """The numbers of trials that every launch has."""
    fewest = min((len(launch.baseline_us) for launch in launches), default=0)
    return [trials for trials in TRIALS if trials <= fewest]
