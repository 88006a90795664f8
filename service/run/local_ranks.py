"""Ranks as plain child processes of this one, without Ray: for tests, and to measure what Ray costs."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from service.run.rank_group import RankGroup, Whereabouts
from workers.host import RankHost
from workers.messages import Answer, Request


class LocalRank:
    """See `RankHandle`."""

    def __init__(self) -> None:
        self._host = RankHost()
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="local-rank")
        cores, niceness = len(os.sched_getaffinity(0)), os.getpriority(os.PRIO_PROCESS, 0)
        self.where = Whereabouts("local", socket.gethostname(), "127.0.0.1", "lo", cores, os.getpid(), niceness)

    def launch(self, import_paths: Sequence[str]) -> Future[int]:
        return self._threads.submit(self._host.launch, tuple(import_paths))

    def ask(self, request: Request, timeout_s: float) -> Future[Answer]:
        return self._threads.submit(self._host.ask, request, timeout_s)

    def stack(self) -> Future[str]:
        return self._threads.submit(self._host.stack)

    def kill_rank(self) -> Future[None]:
        return self._threads.submit(self._host.kill)

    def kill(self) -> None:
        self._host.close()
        self._threads.shutdown(wait=False, cancel_futures=True)


def local_group(cp_size: int) -> RankGroup:
    """A group of `cp_size` ranks under this process."""
    return RankGroup([LocalRank() for _ in range(cp_size)])
