"""Affinity: a rank's own cores, and which of its threads gives way there.

Ranks that float over a node's cores land on one of them together now and then, and their times double. Seen on two cores: medians of 6.2
against 4.6 ms, and a launch's mean log ratio of equal arms scattered by 4.8 % against 2.3 %.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

EVENT_LOOP = "gloo_tcp_loop"
"""What gloo names the thread that reads and writes its sockets, as in torch 2.13."""


def share_of_cores(cores: list[int], index: int, count: int) -> tuple[int, ...]:
    """The cores of rank `index` of the `count` on a node: neighbours, as many for each; all of them where there are fewer than ranks."""
    each = len(cores) // count
    ordered = sorted(cores)
    return tuple(ordered[index * each : (index + 1) * each] if each else ordered)


def settle_on(cores: tuple[int, ...]) -> tuple[int, ...]:
    """Moves every thread of this process to these cores, and those it will start; the cores that the system then grants."""
    for thread in os.listdir("/proc/self/task"):
        # A thread may end meanwhile; the store's and gloo's own ones are moved as well.
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread), cores)
    return tuple(sorted(os.sched_getaffinity(0)))


@contextlib.contextmanager
def event_loop_that_gives_way() -> Iterator[None]:
    """Puts the event loop of a gloo group that is made and has met inside under SCHED_BATCH, so that a message which wakes it does not preempt who
    runs. Threads name themselves when they first run: the group must have met.

    gloo's loop only tries the lock of a connection and polls again, at once, while somebody holds it (gloo/transport/tcp/pair.cc,
    `Pair::handleEvents`). A loop that has preempted a sender inside that lock on their one core therefore spins until its time slice is over.
    `tests/benchmarks/bench_event_loop.py`, two cores: a third of the trials of 1.1 ms took 3 ms longer, and pairs of equal arms scattered by 76 %
    against 16 %.
    """
    before = set(os.listdir("/proc/self/task"))
    yield
    names = {int(thread): _name(thread) for thread in set(os.listdir("/proc/self/task")) - before}
    # torch 2.11's loop has no name, as its main thread; its senders have theirs.
    loop = EVENT_LOOP if EVENT_LOOP in names.values() else _name(os.getpid())
    for thread in (thread for thread, name in names.items() if name == loop):
        with contextlib.suppress(OSError):  # a sandbox may know no policies: then all stays as it was
            os.sched_setscheduler(thread, os.SCHED_BATCH, os.sched_param(0))


def _name(thread: str | int) -> str:
    """What it is called; empty when it is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/self/task/{thread}/comm").read_text().strip()
    return ""
