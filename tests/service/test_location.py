"""The shift between two columns of trials is the definition's, and neither drift nor preempted trials move it."""

from __future__ import annotations

import math
import random
from statistics import median, pvariance

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.judge.location import REACH, shift

VALUES = st.floats(-10, 10, allow_nan=False)
ROWS = st.lists(st.tuples(VALUES, VALUES, st.integers(0, 2)), min_size=1, max_size=30).map(
    lambda rows: sorted(rows, key=lambda row: row[2])
)


def test_a_few_preempted_trials_do_not_speak_for_all():
    assert shift([0.0] * 18, [0.0] * 15 + [5.0] * 3, [0] * 18) == 0.0


@given(ROWS)
def test_a_shift_is_the_median_over_near_rows_of_a_block(rows):
    near = [
        other - baseline
        for i, (_, other, block) in enumerate(rows)
        for j, (baseline, _, theirs) in enumerate(rows)
        if abs(i - j) <= REACH and block == theirs
    ]
    assert shift(*zip(*rows, strict=True)) == pytest.approx(median(near), abs=1e-9)


@given(ROWS, st.floats(-1, 1))
def test_a_shift_of_one_column_is_added_and_trading_columns_turns_it_round(rows, planted):
    baseline, other, blocks = zip(*rows, strict=True)
    found = shift(baseline, other, blocks)
    assert shift(baseline, [value + planted for value in other], blocks) == pytest.approx(found + planted, abs=1e-9)
    assert shift(other, baseline, blocks) == pytest.approx(-found, abs=1e-9)


@given(st.integers(1, 40), st.floats(-0.1, 0.1), st.floats(-0.5, 0.5))
def test_drift_within_a_block_and_steps_between_blocks_cancel(rows, slope, step):
    blocks = [row // 10 for row in range(rows)]
    level = [slope * row + step * block for row, block in enumerate(blocks)]
    assert shift(level, [value + 0.05 for value in level], blocks) == pytest.approx(0.05, abs=1e-9)


def test_where_noise_is_skew_a_shift_needs_fewer_rows_than_one_difference_a_row():
    """Trials near the fastest, some preempted: exponential noise, beside their pseudomedian. The classical efficiencies are 3 and 1.5."""
    rng = random.Random(5)
    of_shift, of_pairs = [], []
    for _ in range(300):
        baseline, other = ([rng.expovariate(1) for _ in range(40)] for _ in range(2))
        of_shift.append(shift(baseline, other, [0] * 40))
        pairs = [ours - theirs for ours, theirs in zip(other, baseline, strict=True)]
        of_pairs.append(median((a + b) / 2 for i, a in enumerate(pairs) for b in pairs[i:]))
    assert pvariance(of_shift) < 0.75 * pvariance(of_pairs)
    assert abs(sum(of_shift) / 300) < 3 * math.sqrt(pvariance(of_shift) / 300)


@pytest.mark.parametrize(("baseline", "other", "blocks"), [([], [], []), ([1.0], [], [0]), ([1.0], [1.0], [])])
def test_a_shift_needs_rows_of_both(baseline, other, blocks):
    with pytest.raises(ValueError, match="rows of both"):
        shift(baseline, other, blocks)
