"""A Williams design is balanced: positions, and who follows whom."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.spec.blocks import block_rows, rows_per_block, williams_rows


@given(st.integers(1, 14))
def test_every_treatment_takes_each_position_and_follows_every_other_equally_often(count):
    rows = williams_rows(count)
    assert len(rows) == (count if count % 2 == 0 or count == 1 else 2 * count) or count == 1
    for position in range(count):
        assert len(set(Counter(row[position] for row in rows).values())) == 1
    followers = Counter(pair for row in rows for pair in itertools.pairwise(row))
    assert len(followers) == count * (count - 1)
    assert len(set(followers.values())) <= 1


@given(st.lists(st.text(min_size=1), min_size=1, max_size=8, unique=True), st.integers(1, 20), st.integers())
def test_blocks_hold_whole_designs(variants, trials, seed):
    rows = block_rows(variants, trials, seed)
    assert all(sorted(row) == sorted(variants) for row in rows)
    assert len(rows) == rows_per_block(len(variants), trials) >= trials
    assert rows == block_rows(variants, trials, seed)


@pytest.mark.parametrize("variants", [[], ["a", "a"]])
def test_a_block_needs_distinct_variants(variants):
    with pytest.raises(ValueError, match="distinct"):
        block_rows(variants, 2, 0)
