"""Splits are index arithmetic: every token has one owner, and the gather puts it back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from experiments.names import Split
from experiments.spec.eligibility import is_beyond_upstream, why_not
from experiments.workload.step import Step
from tests.conftest import make_step
from workers.splits import SPLITS, plan
from workers.splits.plan import causal_ranges
from workers.splits.zigzag import block_sizes


def gathered(step: Step, split: Split, cp_size: int) -> torch.Tensor:
    """What comes back when every rank sends its own token numbers: pad, concatenate, index."""
    plans = [plan(split, step, cp_size, rank) for rank in range(cp_size)]
    rows = []
    for p in plans:
        pad = torch.full((p.max_rows - len(p.local_rows_T),), -1)
        rows.append(torch.cat([p.local_rows_T, pad]))
    return torch.cat(rows)[plans[0].source_rows_S]


@st.composite
def steps(draw):
    cp_size = draw(st.sampled_from([1, 2, 3, 4, 8]))
    shapes = draw(st.lists(st.tuples(st.integers(0, 50), st.integers(2 * cp_size, 200)), min_size=1, max_size=3))
    return make_step(*shapes), cp_size


@given(steps(), st.sampled_from(list(Split)))
def test_split_then_gather_is_the_identity(case, split):
    step, cp_size = case
    assert torch.equal(gathered(step, split, cp_size), torch.arange(step.new_tokens))


@given(steps(), st.sampled_from(list(Split)))
def test_every_token_has_one_owner(case, split):
    step, cp_size = case
    plans = [plan(split, step, cp_size, rank) for rank in range(cp_size)]
    owned = torch.cat([p.local_rows_T for p in plans]).sort().values
    assert torch.equal(owned, torch.arange(step.new_tokens))
    for p in plans:
        assert len(p.local_rows_T) == p.counts[p.rank] <= p.max_rows
        assert max(p.counts) - min(p.counts) <= len(step.sequences)
        assert sum(end - start for start, end in p.blocks) == p.local_tokens


@given(st.integers(1, 40).map(lambda n: 2 * n), st.integers(0, 2000))
def test_zigzag_blocks_differ_by_one_at_most(num_blocks, length):
    sizes = block_sizes(length, num_blocks)
    assert sum(sizes) == length
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] - sizes[-1] <= 1


def test_the_worked_example_of_19_tokens_on_4_ranks():
    step = make_step((0, 19))
    plans = [plan(Split.ZIGZAG, step, 4, rank) for rank in range(4)]
    assert block_sizes(19, 8) == [3, 3, 3, 2, 2, 2, 2, 2]
    assert plans[0].counts == (5, 5, 5, 4)
    assert plans[0].max_rows == 5
    assert plans[0].local_rows_T.tolist() == [0, 1, 2, 17, 18]
    # Chunks arrive as prev and next of each rank; in token order that is 0, 2, 4, 6, 7, 5, 3, 1.
    firsts = [0, 5, 10, 15, 17, 13, 8, 3]
    assert [int(plans[0].source_rows_S[t]) for t in (0, 3, 6, 9, 11, 13, 15, 17)] == firsts


def test_several_sequences_under_zigzag_keep_prevs_before_nexts():
    step = make_step((0, 8), (0, 9))
    assert plan(Split.ZIGZAG, step, 2, 0).local_rows_T.tolist() == [0, 1, 8, 9, 10, 6, 7, 15, 16]
    assert is_beyond_upstream(Split.ZIGZAG, step)
    assert not is_beyond_upstream(Split.INTERLEAVE, step)


def test_interleave_pads_on_the_wire_only():
    p = plan(Split.INTERLEAVE, make_step((0, 7)), 3, 2)
    assert p.counts == (3, 2, 2)
    assert p.local_rows_T.tolist() == [2, 5]
    assert p.received_bytes(256) == 2 * 3 * 256


@pytest.mark.parametrize("lengths", [(1, 2, 9), (3, 1, 1), (1, 1, 1, 1), (2, 30, 1)])
@pytest.mark.parametrize("cp_size", [2, 3, 4])
def test_ranks_without_a_row_of_some_sequence_still_gather_every_token(lengths, cp_size):
    step = make_step(*((5, n) for n in lengths))
    plans = [plan(Split.INTERLEAVE, step, cp_size, rank) for rank in range(cp_size)]
    assert torch.equal(gathered(step, Split.INTERLEAVE, cp_size), torch.arange(step.new_tokens))
    sequence_of = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    rows = torch.stack([sequence_of[p.local_rows_T].bincount(minlength=len(lengths)) for p in plans])
    assert int(rows.min()) == 0
    assert rows.sum(0).tolist() == list(lengths)


@given(st.integers(2, 8), st.lists(st.integers(1, 60), min_size=1, max_size=4))
def test_interleaved_rows_of_a_sequence_follow_the_closed_form(cp_size, lengths):
    """n_b = f(E_b) - f(E_{b-1}) with f(E) = E // c + (E mod c > r)."""
    step = make_step(*((0, n) for n in lengths))
    if why_not(Split.INTERLEAVE, step, cp_size):
        return
    ends = torch.tensor(lengths).cumsum(0).tolist()
    for rank in range(cp_size):
        rows = plan(Split.INTERLEAVE, step, cp_size, rank).local_rows_T
        start = 0
        for end in ends:
            expected = (end // cp_size + (end % cp_size > rank)) - (start // cp_size + (start % cp_size > rank))
            assert int(((rows >= start) & (rows < end)).sum()) == expected
            start = end


@pytest.mark.parametrize(
    ("split", "shapes", "cp_size", "reason"),
    [
        (Split.ZIGZAG, [(0, 100), (9, 7)], 4, "8 new tokens in every sequence; the shortest has 7"),
        (Split.INTERLEAVE, [(0, 3)], 4, "at least cp_size = 4"),
    ],
)
def test_short_steps_are_refused_and_run_unsplit(split, shapes, cp_size, reason):
    step = make_step(*shapes)
    assert reason in why_not(split, step, cp_size)
    unsplit = plan(split, step, cp_size, 1)
    assert not unsplit.is_split
    assert unsplit.received_bytes(256) == 0
    assert unsplit.local_tokens == step.new_tokens


def test_one_rank_owns_everything():
    for split in Split:
        p = plan(split, make_step((3, 5)), 1, 0)
        assert p.local_rows_T.sort().values.tolist() == [0, 1, 2, 3, 4]


def test_causal_ranges_of_the_published_example():
    ranges = causal_ranges(make_step((7, 3), (2, 2)))
    assert ranges.ks_S.tolist() == [0, 0, 0, 10, 10]
    assert ranges.ke_S.tolist() == [8, 9, 10, 13, 14]
    assert ranges.positions_S.tolist() == [7, 8, 9, 2, 3]
    assert ranges.packed_rows_S.tolist() == [7, 8, 9, 12, 13]
    assert ranges.prefix_rows.tolist() == [0, 1, 2, 3, 4, 5, 6, 10, 11]


def test_every_name_has_a_planner():
    assert set(SPLITS) == set(Split)
