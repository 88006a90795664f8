"""Intervals hold their level at the few launches that runs have."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.judge.interval import Interval, fieller_interval, mean_interval

finite = st.floats(-1e6, 1e6, allow_nan=False)


@given(st.lists(finite, min_size=2, max_size=20), finite)
def test_shifting_values_shifts_the_interval(values, by):
    before, after = mean_interval(values, 0.95), mean_interval([v + by for v in values], 0.95)
    for a, b in zip((before.estimate, before.low, before.high), (after.estimate, after.low, after.high), strict=True):
        assert b == pytest.approx(a + by, abs=1e-3)


def test_one_value_bounds_nothing():
    interval = mean_interval([3.0], 0.95)
    assert (interval.low, interval.high) == (-math.inf, math.inf)
    assert not interval.excludes(1e9)


@pytest.mark.parametrize("launches", [3, 5, 10])
def test_mean_interval_covers_what_it_claims(launches):
    rng = random.Random(launches)
    hits = sum(not mean_interval([rng.gauss(7, 2) for _ in range(launches)], 0.95).excludes(7) for _ in range(4000))
    assert 0.94 <= hits / 4000 <= 0.96


@pytest.mark.parametrize("launches", [3, 5, 10])
def test_fieller_covers_what_it_claims(launches):
    rng = random.Random(launches)
    hits = runs = 0
    for _ in range(3000):
        gathers = [rng.gauss(20, 2) for _ in range(launches)]
        covered = [0.6 * g + rng.gauss(0, 1.5) for g in gathers]
        interval = fieller_interval(covered, gathers, 0.95)
        if interval is not None:
            runs += 1
            hits += not interval.excludes(0.6)
    assert runs > 2000
    assert hits / runs >= 0.935


def test_fieller_is_unbounded_when_the_denominator_is_lost():
    assert fieller_interval([1.0, 2.0, 1.5], [-5.0, 6.0, 0.1], 0.95) is None


def test_intervals_know_what_they_exclude():
    interval = Interval(0.9, 0.85, 0.95)
    assert interval.excludes(1)
    assert not interval.excludes(0.95)
    assert interval.inside(0.8, 0.96)
    assert not interval.inside(0.86, 0.96)
    assert interval.beyond(interval.high + 1e-9, 2.0)
    assert interval.beyond(0.1, interval.low - 1e-9)
    assert not interval.beyond(interval.high, 2.0)
