"""The event loop: gloo's thread that reads and writes a rank's sockets, and when it may take the core from another.

gloo's loop only tries the lock of a connection and polls again, at once, while somebody holds it (gloo/transport/tcp/pair.cc,
`Pair::handleEvents`). A loop that has preempted a sender inside that lock on their one core therefore spins until its time slice is over.
`tests/benchmarks/bench_event_loop.py`, two cores: a third of the trials of 1.1 ms took 3 ms longer, and pairs of equal arms scattered by 76 %
against 16 %. So it gives way to whoever runs: SCHED_BATCH.

Beside a main lane that computes, giving way means to hear a peer only at the next tick, of 4 ms on many kernels, several times a gather
(`tests/benchmarks/bench_prompt_loop.py`). There it is `prompt` once the gather is handed over.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

NAME = "gloo_tcp_loop"
"""What gloo calls the thread, as in torch 2.13."""


class EventLoop:
    """Gives way from its making on. Without threads, as a rank that has no group on sockets: nothing to do, and false."""

    def __init__(self, threads: Iterable[int] = ()) -> None:
        self.threads = tuple(threads)
        self._set(os.SCHED_BATCH)

    def __bool__(self) -> bool:
        return bool(self.threads)

    @contextlib.contextmanager
    def prompt(self) -> Iterator[None]:
        """Inside, a message that wakes it is read at once, whoever computes. For the wait of a collective whose sends are under way."""
        self._set(os.SCHED_OTHER)
        try:
            yield
        finally:
            self._set(os.SCHED_BATCH)

    def _set(self, policy: int) -> None:
        for thread in self.threads:
            with contextlib.suppress(OSError):  # a sandbox may know no policies: then all stays as it was
                os.sched_setscheduler(thread, policy, os.sched_param(0))


def threads_now() -> frozenset[int]:
    """Of this process."""
    return frozenset(map(int, os.listdir("/proc/self/task")))


def event_loop_since(before: frozenset[int]) -> EventLoop:
    """That of the group which was made, and has met, since `before` was taken: threads name themselves when they first run."""
    names = {thread: _name(thread) for thread in threads_now() - before}
    # torch 2.11's loop has no name, as its main thread; its senders have theirs.
    loop = NAME if NAME in names.values() else _name(os.getpid())
    return EventLoop(thread for thread, name in names.items() if name == loop)


def _name(thread: int) -> str:
    """What it is called; empty when it is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/self/task/{thread}/comm").read_text().strip()
    return ""
