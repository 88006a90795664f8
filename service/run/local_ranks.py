"""Ranks as plain child processes of this one, without Ray: for tests, and to measure what Ray costs."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from experiments.names import Device
from service.run.rank_group import RankGroup, Whereabouts
from service.run.resources import refuse_more_ranks_than_gpus
from workers.host import RankHost
from workers.messages import Answer, Request
from workers.standing import Standing


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

    def standing(self) -> Future[Standing]:
        return self._threads.submit(self._host.standing)

    def kill_rank(self) -> Future[None]:
        return self._threads.submit(self._host.kill)

    def kill(self) -> None:
        self._host.close()
        self._threads.shutdown(wait=False, cancel_futures=True)


def local_group(cp_size: int, device: Device = Device.CPU, gpus_per_rank: float = 1.0) -> RankGroup:
    """A group of `cp_size` ranks under this process. On CUDA they take its GPUs in turn.

    Raises:
        UserError: More ranks than GPUs, unless `gpus_per_rank` lets them share one.
    """
    if device is Device.CUDA:
        refuse_more_ranks_than_gpus(cp_size, gpus_per_rank)
    return RankGroup([LocalRank() for _ in range(cp_size)])
