"""CPU lanes: the main lane is the calling thread, the side lane one thread of an executor.

torch releases the interpreter lock inside operators, and a gather sleeps or waits on sockets, so the lanes really run side by side
as far as there are cores.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from experiments.names import Lane
from workers.lanes import Mark

if TYPE_CHECKING:
    from workers.fabrics.transport import CollectiveTransport

R = TypeVar("R")


class CpuJoin:
    def __init__(self, future: Future[Any], timeout_s: float) -> None:
        self._future, self._timeout_s = future, timeout_s

    def enqueue(self) -> None:
        """It runs already."""

    def join(self) -> Any:
        return self._future.result(self._timeout_s)


class CpuLanes:
    """See `Lanes`; a mark is CLOCK_MONOTONIC in us, one clock for all ranks of a host."""

    device = torch.device("cpu")

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._side = ThreadPoolExecutor(1, thread_name_prefix="side-lane")
        self._side_thread = self._side.submit(threading.get_ident).result()  # the thread starts here, not inside a trial
        self._in_flight: list[Future[Any]] = []

    @property
    def lane(self) -> Lane:
        return Lane.SIDE if threading.get_ident() == self._side_thread else Lane.MAIN

    def mark(self) -> float:
        return time.monotonic_ns() / 1e3

    def us(self, mark: Mark) -> float:
        return float(mark)

    def host_us(self) -> None:
        return None

    def meet(self, transport: CollectiveTransport) -> None:
        transport.barrier()

    def stage(self, name: str, function: Callable[..., R], *args: Any) -> R:
        return function(*args)

    def busy_wait(self, wait_us: float) -> None:
        end_ns = time.monotonic_ns() + round(wait_us * 1e3)
        while time.monotonic_ns() < end_ns:
            pass

    def hold_back(self, delay_us: float) -> None:
        time.sleep(delay_us / 1e6)

    def fork(self, work: Callable[[], Any], is_deferred: bool = False) -> CpuJoin:
        # Eager CPU operators are complete when they return: what the main lane did so far is there to read.
        future = self._side.submit(work)
        self._in_flight.append(future)
        return CpuJoin(future, self._timeout_s)

    def capture(self, work: Callable[[], R]) -> tuple[Callable[[], None], R]:
        raise AssertionError("specs allow graphs on a GPU alone")

    def drain(self) -> None:
        pending, self._in_flight = self._in_flight, []
        if wait(pending, self._timeout_s).not_done:
            raise TimeoutError(f"the side lane is still busy after {self._timeout_s:g} s")

    def close(self) -> None:
        self._side.shutdown(wait=False, cancel_futures=True)
