"""The prefix cache: what it credits, what it keeps, and what it must not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.workload.prefix_cache import PrefixCache

BLOCK = 4


def full(*ids: int) -> tuple[int, tuple[int, ...]]:
    """A prompt whose blocks are all full, as (tokens, ids)."""
    return BLOCK * len(ids), ids


def test_an_empty_cache_hits_nothing() -> None:
    assert PrefixCache(BLOCK).hit_blocks(*full(0, 1, 2)) == 0


def test_hits_the_longest_run_of_leading_blocks() -> None:
    cache = PrefixCache(BLOCK)
    cache.insert(*full(0, 1, 2))
    assert cache.hit_blocks(*full(0, 1, 2, 3)) == 3
    assert cache.hit_blocks(*full(0, 1, 5, 6)) == 2
    assert cache.hit_blocks(*full(7, 0, 1, 2)) == 0


def test_a_run_ends_at_the_first_miss() -> None:
    cache = PrefixCache(BLOCK)
    cache.insert(*full(0, 1, 2))
    assert cache.hit_blocks(*full(0, 9, 2, 3)) == 1


def test_a_block_is_no_hit_after_another_prefix() -> None:
    cache = PrefixCache(BLOCK)
    cache.insert(*full(0, 1, 2))
    assert cache.hit_blocks(*full(1, 2, 3)) == 0, "1 is cached, but after 0"
    assert cache.hit_blocks(*full(0, 2, 3)) == 1, "2 is cached, but after 1"


def test_a_full_hit_computes_its_last_block_again() -> None:
    cache = PrefixCache(BLOCK)
    cache.insert(*full(0, 1, 2))
    assert cache.hit_blocks(*full(0, 1, 2)) == 2
    assert cache.hit_blocks(13, (0, 1, 2, 3)) == 3, "one token beyond is enough to compute"


def test_a_prompt_of_one_block_never_hits() -> None:
    cache = PrefixCache(BLOCK)
    cache.insert(*full(0))
    assert cache.hit_blocks(*full(0)) == 0
    assert cache.hit_blocks(1, (0,)) == 0


def test_a_partial_last_block_is_neither_kept_nor_hit() -> None:
    cache = PrefixCache(BLOCK)
    cache.insert(7, (0, 1))
    assert len(cache) == 1
    assert cache.hit_blocks(7, (0, 1)) == 1
    assert cache.hit_blocks(*full(0, 1, 2)) == 1


def test_the_least_recently_used_chain_goes_first() -> None:
    cache = PrefixCache(BLOCK, capacity_blocks=4)
    cache.insert(*full(0, 1))
    cache.insert(*full(2, 3))
    cache.insert(*full(0, 1))
    cache.insert(*full(4, 5))
    assert cache.hit_blocks(*full(0, 1, 9)) == 2
    assert cache.hit_blocks(*full(2, 3, 9)) == 0
    assert cache.hit_blocks(*full(4, 5, 9)) == 2


def test_a_chain_loses_its_end_first() -> None:
    cache = PrefixCache(BLOCK, capacity_blocks=2)
    cache.insert(*full(0, 1, 2, 3))
    assert cache.hit_blocks(*full(0, 1, 2, 3, 4)) == 2


def test_no_capacity_is_no_cache() -> None:
    cache = PrefixCache(BLOCK, capacity_blocks=0)
    cache.insert(*full(0, 1))
    assert len(cache) == 0
    assert cache.hit_blocks(*full(0, 1, 2)) == 0


@pytest.mark.parametrize(("block_tokens", "capacity_blocks"), [(0, None), (-1, 4), (4, -1)])
def test_senseless_sizes_are_refused(block_tokens: int, capacity_blocks: int) -> None:
    with pytest.raises(ValueError, match="block_tokens"):
        PrefixCache(block_tokens, capacity_blocks)


@st.composite
def prompts(draw: st.DrawFn) -> list[tuple[int, tuple[int, ...]]]:
    """Prompts whose ids name whole prefixes, as in a trace: equal ids follow equal ids."""
    texts = draw(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), max_size=12))
    names: dict[tuple[int, ...], int] = {}
    result = []
    for text in texts:
        ids = tuple(names.setdefault(tuple(text[: end + 1]), len(names)) for end in range(len(text)))
        result.append((draw(st.integers(BLOCK * (len(text) - 1) + 1, BLOCK * len(text))), ids))
    return result


@given(requests=prompts())
def test_without_bound_a_hit_is_the_longest_prefix_any_earlier_prompt_left(requests: list[tuple[int, tuple[int, ...]]]) -> None:
    cache = PrefixCache(BLOCK)
    left: set[int] = set()
    for tokens, ids in requests:
        expected = 0
        while expected < len(ids) and ids[expected] in left and (expected + 1) * BLOCK < tokens:
            expected += 1
        assert cache.hit_blocks(tokens, ids) == expected
        cache.insert(tokens, ids)
        left.update(ids[: tokens // BLOCK])


@given(requests=prompts(), capacity=st.integers(0, 8))
def test_a_bounded_cache_keeps_whole_prefixes_and_never_beats_an_unbounded_one(
    requests: list[tuple[int, tuple[int, ...]]], capacity: int
) -> None:
    bounded, unbounded = PrefixCache(BLOCK, capacity), PrefixCache(BLOCK)
    for tokens, ids in requests:
        hits = bounded.hit_blocks(tokens, ids)
        assert hits <= unbounded.hit_blocks(tokens, ids)
        assert hits * BLOCK < tokens
        bounded.insert(tokens, ids)
        unbounded.insert(tokens, ids)
        assert len(bounded) <= capacity
        for _, chain in requests:
            kept = [block_id in bounded for block_id in chain]
            assert kept == sorted(kept, reverse=True), "a block without the one before it is of no use"
