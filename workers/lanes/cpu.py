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

from experiments.names import Lane

if TYPE_CHECKING:
    from workers.fabrics.transport import CollectiveTransport

R = TypeVar("R")


class CpuJoin:
    def __init__(self, future: Future[Any], timeout_s: float) -> None:
        self._future, self._timeout_s = future, timeout_s

    def join(self) -> Any:
        return self._future.result(self._timeout_s)


class CpuLanes:
    """See `Lanes`; time is CLOCK_MONOTONIC, one clock for all ranks of a host."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._side = ThreadPoolExecutor(1, thread_name_prefix="side-lane")
        self._side_thread = self._side.submit(threading.get_ident).result()  # the thread starts here, not inside a trial
        self._in_flight: list[Future[Any]] = []

    @property
    def lane(self) -> Lane:
        return Lane.SIDE if threading.get_ident() == self._side_thread else Lane.MAIN

    def now_us(self) -> float:
        return time.monotonic_ns() / 1e3

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

    def fork(self, work: Callable[[], Any]) -> CpuJoin:
        # Eager CPU operators are complete when they return: what the main lane did so far is there to read.
        future = self._side.submit(work)
        self._in_flight.append(future)
        return CpuJoin(future, self._timeout_s)

    def drain(self) -> None:
        pending, self._in_flight = self._in_flight, []
        if wait(pending, self._timeout_s).not_done:
            raise TimeoutError(f"the side lane is still busy after {self._timeout_s:g} s")

    def close(self) -> None:
        self._side.shutdown(wait=False, cancel_futures=True)
