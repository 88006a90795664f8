"""One clock for the spans of all ranks. Ranks of one host share CLOCK_MONOTONIC; ranks of several do not, and rank 0's is taken.

A rank reads its clock, asks rank 0 for its own, and reads again. Rank 0 answered somewhere in between, so the middle is wrong by at most half
the round trip, whatever the two ways took (Cristian, Distributed Computing 3, 1989). The shortest of many round trips says most. Clocks also
drift: the offset is taken before and after what is to be placed, and the interval published covers both.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from workers.fabrics.transport import CollectiveTransport

ROUNDS = 32


@dataclass(frozen=True)
class ClockOffset:
    """Added to a rank's clock it gives rank 0's, and is wrong by at most `uncertainty_ns`."""

    offset_ns: int
    uncertainty_ns: int

    def covering(self, other: ClockOffset) -> ClockOffset:
        """The least offset interval that holds both: a clock that drifted evenly from one to the other was inside it all the time."""
        low = min(self.offset_ns - self.uncertainty_ns, other.offset_ns - other.uncertainty_ns)
        high = max(self.offset_ns + self.uncertainty_ns, other.offset_ns + other.uncertainty_ns)
        middle = (low + high) // 2
        return ClockOffset(middle, high - middle)


SHARED = ClockOffset(0, 0)


def best_offset(rounds: Iterable[tuple[int, int, int]]) -> ClockOffset:
    """The offset by the shortest of round trips (sent, rank 0's answer, received), all in ns."""
    sent, answered, received = min(rounds, key=lambda trip: trip[2] - trip[0])
    return ClockOffset(answered - (sent + received) // 2, (received - sent + 1) // 2 + 1)


def offset_to_rank_0(
    transport: CollectiveTransport, rank: int, num_ranks: int, now_ns: Callable[[], int] = time.monotonic_ns
) -> ClockOffset:
    """This rank's offset. A collective: rank 0 answers every other rank in turn, so all ranks ask at the same place."""
    word = torch.zeros(1, dtype=torch.int64)
    if rank == 0:
        for peer in range(1, num_ranks):
            for _ in range(ROUNDS):
                transport.receive(word, peer)
                word[0] = now_ns()
                transport.send(word, peer)
        return SHARED
    trips = []
    for _ in range(ROUNDS):
        sent = now_ns()
        transport.send(word, 0)
        transport.receive(word, 0)
        trips.append((sent, int(word), now_ns()))
    return best_offset(trips)
