"""Planned looks share the error out, and intervals read at every look hold together."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.judge.comparison import Evidence
from service.judge.looks import Looks

plans = st.tuples(st.integers(1, 60), st.integers(0, 300)).map(lambda pair: Looks(pair[0], pair[0] + pair[1]))


@given(plans)
def test_looks_run_from_the_first_to_the_last(plan):
    planned = plan.planned
    assert planned[0] == plan.first
    assert planned[-1] == plan.last
    assert all(a < b for a, b in pairwise(planned))


@given(plans)
def test_the_planned_looks_spend_the_whole_error_once(plan):
    assert sum(plan.share(n) for n in plan.planned) == pytest.approx(1)


@given(plans, st.data())
def test_a_look_out_of_plan_spends_less_than_the_planned_one_after_it(plan, data):
    n = data.draw(st.integers(1, plan.last))
    after = next(look for look in plan.planned if look >= n)
    assert 0 < plan.share(n) <= plan.share(after)


def test_one_look_spends_everything_there():
    assert Looks(5, 5).planned == (5,)
    assert Looks(5, 5).share(5) == 1


def test_the_usual_plan():
    assert Looks(5, 20).planned == (5, 8, 13, 20)


def alarms(logs_RL: np.ndarray, plan: Looks) -> float:
    """Share of rows whose interval excludes 1 at any planned look."""
    hits = 0
    for row in logs_RL:
        hits += any(
            Evidence(tuple(row[:n]), tuple(row[:n]), plan.share(n), n).read(0.05, 0.05).ratio.excludes(1) for n in plan.planned
        )
    return hits / len(logs_RL)


def test_looking_again_and_again_raises_no_more_alarms_than_promised():
    """2,000 pairs of equal arms, looked at four times each: at most 5 % may ever be called different; unplanned looks would call 11 %."""
    rng = np.random.default_rng(1)
    logs = rng.normal(0, 0.01, (2000, 20))
    plan = Looks(5, 20)
    rate = alarms(logs, plan)
    assert 0.02 < rate < 0.05 + 2 * (0.05 * 0.95 / 2000) ** 0.5

    class Greedy(Looks):
        def share(self, launches):
            return 1.0

    assert alarms(logs[:1000], Greedy(5, 20)) > 0.08


def test_who_watches_reads_the_last_planned_look():
    looks = Looks(8, 20)
    assert [looks.last_planned(n) for n in (0, 7, 8, 12, 13, 19, 20, 25)] == [0, 0, 8, 8, 13, 13, 20, 20]
