"""An offset between clocks is found within the bound that is stated with it, whatever the two ways of a message take."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.clock import ROUNDS, SHARED, ClockOffset, best_offset, offset_to_rank_0

WAY_NS = st.integers(0, 10**9)


@given(st.integers(-(10**15), 10**15), st.lists(st.tuples(WAY_NS, WAY_NS, st.integers(0, 10**12)), min_size=1, max_size=9))
def test_the_true_offset_lies_in_the_bound(offset_ns, ways):
    trips = [(sent, sent + out + offset_ns, sent + out + back) for out, back, sent in ways]
    found = best_offset(trips)
    assert abs(found.offset_ns - offset_ns) <= found.uncertainty_ns
    assert found.uncertainty_ns <= min(out + back for out, back, _ in ways) // 2 + 2


@given(*[st.integers(-(10**12), 10**12), st.integers(0, 10**6)] * 2)
def test_a_covering_offset_holds_both(a, da, b, db):
    one, other = ClockOffset(a, da), ClockOffset(b, db)
    whole = one.covering(other)
    for part in (one, other):
        assert whole.offset_ns - whole.uncertainty_ns <= part.offset_ns - part.uncertainty_ns
        assert whole.offset_ns + whole.uncertainty_ns >= part.offset_ns + part.uncertainty_ns


class Wires:
    """A transport between threads: one queue for each pair and direction."""

    def __init__(self, rank, queues):
        self.rank, self.queues = rank, queues

    def send(self, tensor, to):
        self.queues[self.rank, to].put(tensor.clone())

    def receive(self, tensor, source):
        tensor.copy_(self.queues[source, self.rank].get(timeout=30))


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_every_rank_finds_its_planted_offset(num_ranks):
    shifts_ns = [0, 5_000_000, -(10**12), 77][:num_ranks]
    ticks = itertools.count()  # one clock for all, which every rank reads shifted
    queues = {pair: SimpleQueue() for pair in itertools.permutations(range(num_ranks), 2)}

    def ask(rank):
        return offset_to_rank_0(Wires(rank, queues), rank, num_ranks, lambda: next(ticks) - shifts_ns[rank])

    with ThreadPoolExecutor(num_ranks) as pool:
        found = list(pool.map(ask, range(num_ranks)))
    assert found[0] == SHARED
    assert next(ticks) == 3 * ROUNDS * (num_ranks - 1)
    for offset, shift_ns in zip(found[1:], shifts_ns[1:], strict=True):
        assert abs(offset.offset_ns - shift_ns) <= offset.uncertainty_ns
