"""The rivals' rules say what their tools would, and each is priced by its best plan."""

from __future__ import annotations

import random

import pytest

from service.calibrate.cheapest import LIMITS, as_they_come, cheapest, tuned
from service.calibrate.rivals import OWN, RIVALS, Said, asv, asv_samples, compare_rivals, regression, welch
from service.calibrate.tables import cheapest_table
from tests.service.recordings import make_launch, make_recording


def test_the_habits_rule_calls_a_launchs_level_a_difference():
    """Two launches that differ by their levels alone: a t-test over trials says they differ, a paired comparison cannot."""
    rng = random.Random(0)
    first, second = make_launch(rng, level=1.0), make_launch(rng, level=1.1)
    assert welch([first.baseline_us], [second.other_us]) is Said.SLOWER
    assert welch([second.baseline_us], [first.other_us]) is Said.FASTER
    assert welch([first.baseline_us], [first.other_us]) is Said.NOTHING


FLAT, UP = (100.0, 101.0, 99.0, 100.5) * 5, (106.0, 107.0, 105.0, 106.5) * 5


def test_pytest_benchmark_sees_regressions_only():
    assert regression(min, 5)([FLAT], [UP]) is Said.SLOWER
    assert regression(min, 7)([FLAT], [UP]) is Said.NOTHING
    assert regression(min, 5)([UP], [FLAT]) is Said.NOTHING


def test_asv_needs_both_size_and_evidence():
    assert asv(1.025, is_raw=True)([FLAT], [UP]) is Said.SLOWER
    assert asv(1.025, is_raw=True)([UP], [FLAT]) is Said.FASTER
    assert asv(1.1, is_raw=True)([FLAT], [UP]) is Said.NOTHING
    assert asv(1.025, is_raw=True)([FLAT[:3]], [UP[:3]]) is Said.NOTHING  # three samples cannot reach p < 0.002


def test_asv_averages_trials_into_its_samples():
    assert asv_samples([5000.0, 7000.0] * 10) == [6000.0] * 5
    assert asv_samples([1.0] * 40) == [1.0]  # too few trials to fill one sample are one
    assert asv_samples([20_000.0 + i for i in range(9)]) == [20_000.0 + i for i in range(5)]


def test_rivals_take_disjoint_launches_and_the_service_pairs():
    equal, slower = [make_recording(seed) for seed in range(6)], [make_recording(100 + seed, 5.0) for seed in range(6)]
    rows = {row.name: row for row in compare_rivals(equal, slower, 1.0)}
    assert set(rows) == {*OWN, *(rival.name for rival in RIVALS)}
    for name in OWN:
        assert rows[name].false_alarms.hits == 0
        assert rows[name].found.hits == 6
    assert rows["two runs and a t-test"].false_alarms.count == 6 * 4
    assert rows["two runs and a t-test"].false_alarms.share > 0.5  # levels of launches differ by 10 %
    assert rows["asv, 4 rounds in turn, factor 1.025"].found.count == 6


FIXED = {"first_launches": 8, "max_launches": 8}


def test_every_rule_is_shown_at_its_cheapest():
    equal = [make_recording(seed, **FIXED) for seed in range(30)]
    slower = [make_recording(100 + seed, 5.0, **FIXED) for seed in range(30)]  # 240 launches, whose levels differ by 10 %
    found = {(row.name, row.limit): row for row in cheapest(equal, slower, 1.0)}
    rules = {*OWN, *as_they_come(), *tuned()}
    assert set(found) == {(name, limit) for name in rules for limit in LIMITS}
    for name in OWN:
        own = found[name, 0.01]
        assert own.resolves and own.best.false_alarms.share <= 0.01
        assert " 5 pairs, " in own.best.name  # 2 % a trial: few pairs show 5 %
        assert own.best.false_alarms.count == 240 // max(
            int(n) for n in own.best.name[12 : own.best.name.index(" launches")].split(", ")
        )
    for name in rules - set(OWN):
        assert not found[name, 0.05].resolves  # levels of 10 % hide 5 % from all who compare launches
    lines = cheapest_table([*equal, *slower], 1.0).splitlines()
    assert len(lines) == 2 + len(found)
    assert lines[2].startswith("| 5% | CP Lab |") and lines[2].endswith("| 1.0 |")


def test_a_rule_that_can_is_priced_by_the_least_that_does():
    rng = random.Random(3)
    level = [make_recording(seed, 5.0, launches=0) for seed in range(30)]
    slower = [r.model_copy(update={"launches": tuple(make_launch(rng, 1.05, noise=0.004) for _ in range(8))}) for r in level]
    found = cheapest([make_recording(1)], slower, 1.0)
    best = next(row.best for row in found if row.name == "pytest-benchmark, min:P%")
    assert "1 runs of each, 5 trials" in best.name  # launches agree here: one of each tells
    assert best.launches == 2
    assert best.trials_s == pytest.approx(10 * 1.025e-3, rel=0.05)
    assert all(row.best is None for row in found if row.name in OWN), "one comparison of equal arms shows no rate"


def test_rules_that_leave_the_order_to_the_user_are_tried_in_both():
    for name, family in (as_they_come() | tuned()).items():
        orders = {rival.is_in_turn for rival in family}
        assert orders == ({True} if name.startswith("asv") else {False, True}), name


def test_best_plans_take_recordings_whose_length_the_data_did_not_choose():
    """A comparison that a claim ended lacks the launches that others have: cut anew, it would hide the alarm."""
    recordings = [make_recording(1, launches=5), make_recording(2, 5.0)]
    assert cheapest_table(recordings, 1.0).startswith("no table of best plans")
    assert "(1) and such with 5 % planted (0)" in cheapest_table([make_recording(1, **FIXED), recordings[1]], 1.0)
