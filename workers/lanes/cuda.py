"""CUDA lanes: two streams of one device. The host runs ahead: it enqueues stages, events and waits, and blocks only to drain.

The side stream has the higher priority, as a communication stream has it in SGLang and in torch's own process group: its thread blocks are placed
before those of a kernel that waits on the main stream. Blocks that run already are never taken off an SM, so a kernel that fills the chip still
holds it up: the launch order stays part of a schedule.

Stream safety. The side stream waits for an event of the main stream before it reads what the main stream made, and the main stream for one of the
side stream's before it uses what that made. Tensors that cross are not recorded on the other stream; their lifetimes are argued instead: the
destination and the wire buffers live as long as the cell, and the keys that a gather reads are held by its `Gathering` until the join, after which
nothing that the main stream enqueues can overtake the side stream's reads. What the side stream allocates by itself comes from, and goes back to,
its own pool.
"""

from __future__ import annotations

import gc
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from experiments.names import Lane
from workers.lanes import Mark

if TYPE_CHECKING:
    from workers.fabrics.transport import CollectiveTransport

R = TypeVar("R")

MAIN_PRIORITY, SIDE_PRIORITY = 0, -1
"""Lower is more urgent."""
PREALLOCATED_MARKS = 512
FLUSH_BYTES = 256 << 20
"""Written before a trial: several times the L2 of any GPU so far, so that no trial finds there what the last one left."""
HEAD_START_US = 300.0
ENQUEUE_SHARE = 1.5
RECENT_TRIALS = 48
"""The device sleeps before a trial for the first, and for that multiple of the longest that any recent trial took to enqueue: what is timed then is
the device, not the host. Of many trials, since variants alternate, and one that is a single graph says nothing about the next."""
LONGEST_HEAD_START_US = 50_000.0


def _new_mark() -> torch.cuda.Event:
    """An external one, since a graph may only time itself by such."""
    return torch.cuda.Event(enable_timing=True, external=True)


class CudaJoin:
    """See `Join`."""

    def __init__(self, lanes: CudaLanes, work: Callable[[], Any], fork: torch.cuda.Event) -> None:
        self._lanes, self._work, self._fork = lanes, work, fork
        self._done: torch.cuda.Event | None = None
        self._result: Any = None

    def enqueue(self) -> None:
        if self._done is not None:
            return
        side = self._lanes.side
        side.wait_event(self._fork)
        with torch.cuda.stream(side):
            self._result = self._work()
            self._done = self._lanes.new_event()
            self._done.record(side)

    def join(self) -> Any:
        self.enqueue()
        assert self._done is not None
        self._lanes.main.wait_event(self._done)
        return self._result


class CudaLanes:
    """See `Lanes`; a mark is an event with timing on the calling lane's stream."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.main = torch.cuda.Stream(priority=MAIN_PRIORITY)
        self.side = torch.cuda.Stream(priority=SIDE_PRIORITY)
        torch.cuda.set_stream(self.main)
        self._marks = [_new_mark() for _ in range(PREALLOCATED_MARKS)]
        self._num_marks = 0
        self._events: list[torch.cuda.Event] = [torch.cuda.Event() for _ in range(PREALLOCATED_MARKS)]
        self._num_events = 0
        self._origin = torch.cuda.Event(enable_timing=True)
        self._origin.record()
        self._origin_us = self.host_us()
        self._any_1 = torch.zeros(1, dtype=torch.int64, device=self.device)
        self._is_capturing = False
        self._graph_memory = torch.cuda.graph_pool_handle()
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=self.device)
        self._began_us: float | None = None
        self._last_mark_us = 0.0
        """On the host's clock: between them the host enqueues a trial; none has begun once it was drained."""
        self._enqueued_us: deque[float] = deque(maxlen=RECENT_TRIALS)

    @property
    def lane(self) -> Lane:
        return Lane.SIDE if torch.cuda.current_stream() == self.side else Lane.MAIN

    def mark(self) -> torch.cuda.Event:
        if self._is_capturing:
            event = _new_mark()  # it belongs to the graph
        else:
            if self._num_marks == len(self._marks):
                self._marks.append(_new_mark())
            event = self._marks[self._num_marks]
            self._num_marks += 1
        event.record()
        self._last_mark_us = self.host_us()
        return event

    def us(self, mark: Mark) -> float:
        return self._origin_us + 1e3 * float(self._origin.elapsed_time(mark))

    def host_us(self) -> float:
        return time.monotonic_ns() / 1e3

    def meet(self, transport: CollectiveTransport) -> None:
        """All ranks here, L2 flushed, and the device asleep for as long as the host needs to get ahead."""
        self._flush.zero_()
        transport.barrier()
        torch.cuda.synchronize()
        self._num_marks = self._num_events = 0
        self._origin.record()
        self._origin_us = self.host_us()
        self.hold_back(self.head_start_us)
        transport.align(self._any_1)
        self._began_us = self._last_mark_us = self.host_us()

    @property
    def head_start_us(self) -> float:
        return min(HEAD_START_US + ENQUEUE_SHARE * max(self._enqueued_us, default=0.0), LONGEST_HEAD_START_US)

    def stage(self, name: str, function: Callable[..., R], *args: Any) -> R:
        return function(*args)

    def busy_wait(self, wait_us: float) -> None:
        self.hold_back(wait_us)

    def hold_back(self, delay_us: float) -> None:
        """One thread of the device spins: it takes a corner of one SM."""
        from workers.kernels.clock import sleep_us

        sleep_us(delay_us)

    def fork(self, work: Callable[[], Any], is_deferred: bool = False) -> CudaJoin:
        event = self.new_event()
        event.record(self.main)
        join = CudaJoin(self, work, event)
        if not is_deferred:
            join.enqueue()
        return join

    def new_event(self) -> torch.cuda.Event:
        """One without timing, whose wait costs least; good until the next `meet`."""
        if self._num_events == len(self._events):
            self._events.append(torch.cuda.Event())
        self._num_events += 1
        return self._events[self._num_events - 1]

    def capture(self, work: Callable[[], R]) -> tuple[Callable[[], None], R]:
        """Enqueues `work` into a CUDA graph in place of the streams. Returns what enqueues the graph, and the result of `work`, whose tensors and
        marks every replay writes anew. Both streams must be at one again when `work` returns. What it runs must have run before: nothing
        compiles in here.

        All graphs share one memory: one replay's results stand until the next graph's.
        """
        graph = torch.cuda.CUDAGraph()
        self._is_capturing, was_collecting = True, gc.isenabled()
        gc.disable()  # to destroy another graph, which nobody uses any more, makes a capture that is under way invalid
        try:
            with torch.cuda.graph(graph, pool=self._graph_memory, stream=self.main):
                result = work()
        finally:
            self._is_capturing = False
            if was_collecting:
                gc.enable()
        return graph.replay, result

    def drain(self) -> None:
        # Here and not at the next meeting: what a cell prepares between two trials leaves marks too.
        if self._began_us is not None:
            self._enqueued_us.append(self._last_mark_us - self._began_us)
            self._began_us = None
        deadline_s = time.monotonic() + self._timeout_s
        while not (self.main.query() and self.side.query()):
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"the device is still busy after {self._timeout_s:g} s")
            time.sleep(20e-6)

    def close(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.set_stream(torch.cuda.default_stream())
