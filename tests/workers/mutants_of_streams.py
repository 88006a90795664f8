"""Streams, events and memory gone wrong on a GPU, each by one plausible slip; and a lane that is held back wherever a test wants it.

Run as a program it makes every mutant ready under PyTorch's stream sanitizer and says which ones that sees; `test_stream_safety` holds the answers.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from experiments.names import Control, Execution, Payload, Scope
from experiments.spec.arms import ArmSpec
from tests.workers.one_gpu import CHAIN, NIC, NVLINK, made_ready, one_rank_cell, select_all, shipped_arms, step_of, wrong_in
from workers.fabrics.rows import RowMoves
from workers.lanes.cuda import CudaJoin, CudaLanes
from workers.messages import Variant
from workers.prepared_cell import PreparedCell

LATE_US = 20_000.0
"""Longer than the host and the device take for all else in a trial."""

CONTRACT = "contract"
"""What the schedule left undone when it returned."""
LATE_GATHER = "late gather"
"""The bits, with the side lane held back: whoever does not wait for it reads poison."""
LATE_MAIN = "late main"
"""The bits, with the main lane held back before it makes k, and again after every fork: a side lane that does not wait overtakes it."""
SANITIZER = "sanitizer"
"""PyTorch's CUDA stream sanitizer."""


class HeldJoin:
    """A join with the main lane held back on either side of it."""

    def __init__(self, lanes: HeldLanes, inner: CudaJoin) -> None:
        self.lanes, self.inner = lanes, inner

    def enqueue(self) -> None:
        self.inner.enqueue()

    def join(self) -> Any:
        self.lanes.hold("before the join")
        result = self.inner.join()
        self.lanes.hold("after the join")
        return result


class HeldLanes(CudaLanes):
    """The shipped lanes, held back for as long as `holds_us` says for a place; stages go by their names."""

    def __init__(self, timeout_s: float) -> None:
        super().__init__(timeout_s)
        self.holds_us: Callable[[str], float] = lambda place: 0.0
        self.num_holds = 0

    def hold(self, place: str) -> None:
        """Of the calling lane."""
        if us := self.holds_us(place):
            self.num_holds += 1
            self.hold_back(us)

    def stage(self, name: str, function: Callable[..., Any], *args: Any) -> Any:
        self.hold(name)
        return super().stage(name, function, *args)

    def fork(self, work: Callable[[], Any], is_deferred: bool = False) -> HeldJoin:
        def held() -> Any:
            self.hold("side: before the gather")
            result = work()
            self.hold("side: after the gather")
            return result

        join = HeldJoin(self, self.forked(held, is_deferred))
        self.hold("after the fork")
        return join

    def forked(self, work: Callable[[], Any], is_deferred: bool) -> CudaJoin:
        """What a mutant changes."""
        return super().fork(work, is_deferred)


def hold_wire(cell: PreparedCell) -> None:
    """Lets `HeldLanes` hold the side lane back between the copies of a gather and its wire, too."""
    lanes, fabric = cell.lanes, cell.one_rank
    assert isinstance(lanes, HeldLanes) and fabric is not None
    move = fabric.move

    def held(plan: Any, local: torch.Tensor, everyone: torch.Tensor) -> float:
        lanes.hold("side: before the wire")
        late_us = move(plan, local, everyone)
        lanes.hold("side: after the wire")
        return late_us

    fabric.move = held


# Lanes


class _JoinWithoutWait(CudaJoin):
    def join(self) -> Any:
        self.enqueue()
        return self._result


class _DoneBeforeTheWork(CudaJoin):
    def enqueue(self) -> None:
        if self._done is None:
            self._done = self._lanes.new_event()
            self._done.record(self._lanes.side)
            self._lanes.side.wait_event(self._fork)
            with torch.cuda.stream(self._lanes.side):
                self._result = self._work()


class _MutantLanes(HeldLanes):
    join_type: type[CudaJoin] = CudaJoin
    records_fork = True

    def forked(self, work: Callable[[], Any], is_deferred: bool) -> CudaJoin:
        event = torch.cuda.Event()
        if self.records_fork:
            event.record(self.main)
        join = self.join_type(self, work, event)
        if not is_deferred:
            join.enqueue()
        return join


class JoinsWithoutWait(_MutantLanes):
    """The schedule joins, and the main stream waits for nothing."""

    join_type = _JoinWithoutWait


class DoneBeforeTheWork(_MutantLanes):
    """The main stream waits for an event that was recorded ahead of the gather."""

    join_type = _DoneBeforeTheWork


class ForksWithoutEvent(_MutantLanes):
    """The side stream waits for an event that nobody recorded, which is no wait: it does not wait for k."""

    records_fork = False


# Fabrics and cells


def reorders_on_the_main_stream(cell: PreparedCell) -> None:
    """The rows are put in token order on the stream that waits for them, while they still arrive."""
    lanes, fabric = cell.lanes, cell.one_rank
    assert isinstance(lanes, CudaLanes) and fabric is not None
    right = fabric._rows

    def reorder(everyone_ND: torch.Tensor, rows_S: torch.Tensor, out_SD: torch.Tensor) -> None:
        with torch.cuda.stream(lanes.main):
            right.reorder(everyone_ND, rows_S, out_SD)

    fabric._rows = RowMoves(right.pad, reorder)


def shares_a_destination(cell: PreparedCell) -> None:
    """All layers of a chain gather into one buffer."""
    outs = cell.steps[0].outs
    outs[Payload.BF16] = outs[Payload.BF16][:1] * len(outs[Payload.BF16])


# Schedules


def _allocate_over(freed_at: int, like: torch.Tensor) -> list[torch.Tensor]:
    """What a main lane that needs memory does: tensors full of NaN, as large as `like`, until one of them lies where the freed one lay."""
    made: list[torch.Tensor] = []
    size = like.numel() * like.element_size()
    while len(made) < 512 and not (made and abs(made[-1].data_ptr() - freed_at) < size):
        made.append(torch.full_like(like, torch.nan))
    return made


def allocates_during_the_gather(ix, shard, fabric):
    """Not a mutant: the keys' memory is held until the join, whatever the main lane allocates before that."""
    q, k = ix.project(shard)
    rotated = ix.rotate(k)
    at = rotated.data_ptr()
    gathering = fabric.start_gather(rotated)
    del rotated
    made = _allocate_over(at, k) if not torch.cuda.is_current_stream_capturing() else []
    q = ix.rotate(q)
    keys = gathering.join()
    del made
    return q, keys


def frees_keys_early(ix, shard, fabric):
    """The same without anyone who holds the keys."""
    q, k = ix.project(shard)
    rotated = ix.rotate(k)
    at = rotated.data_ptr()
    gathering = fabric.start_gather(rotated)
    del rotated
    join = gathering._join
    gathering._local_TD = getattr(join, "inner", join)._work = None
    made = _allocate_over(at, k)
    assert abs(made[-1].data_ptr() - at) < k.numel() * k.element_size(), "the allocator gives freed memory again"
    q = ix.rotate(q)
    keys = gathering.join()
    del made
    return q, keys


_seen: list[Any] = []
_kept: list[tuple[torch.Tensor, torch.Tensor]] = []


def reads_the_last_layers_keys(ix, shard, fabric):
    """Not a mutant: reads what the layer before gathered, while this layer's gather is under way. It takes a destination for each layer."""
    if any(ix is layer for layer in _seen):  # a new chain
        _seen.clear()
        _kept.clear()
    q, k = ix.project(shard)
    gathering = fabric.start_gather(ix.rotate(k))
    q = ix.rotate(q)
    if _kept:
        keys, as_they_were = _kept.pop()
        q = torch.where((keys == as_they_were).all(), q, torch.nan)
    _seen.append(ix)
    keys = gathering.join()
    _kept.append((keys, keys.clone()))
    return q, keys


# Cases


@dataclass(frozen=True)
class Mutant:
    """One slip, and who must see it. `blind` are detectors that cannot, by what they are."""

    seen_by: frozenset[str]
    blind: frozenset[str] = frozenset()
    schedule: str = "overlap_gather_first"
    lanes: type[HeldLanes] = HeldLanes
    spoil: Callable[[PreparedCell], None] | None = None
    layers: int = 1

    @contextmanager
    def made_ready(self) -> Any:
        """A cell whose arm `mutant` is one, beside a right `baseline`."""
        cell = one_rank_cell(step_of((0, 401), (70, 130)), layers=self.layers)
        with made_ready(cell, {"baseline": ArmSpec(), "mutant": ArmSpec(schedule=self.schedule)}, self.lanes) as ready:
            for index in range(ready.pool.num_inputs):
                ready.run(Variant("baseline"), 0, index, Scope.QK)  # what compiles does it here, and the right bits are made
                ready.correct(0, index)
            if self.spoil is not None:
                self.spoil(ready)
            _seen.clear()
            _kept.clear()
            yield ready


def _mutant(seen_by: set[str], blind: Iterable[str] = (), **how: Any) -> Mutant:
    return Mutant(frozenset(seen_by), frozenset(blind), **how)


SHARED = "memory: one destination for all layers"
HERE, SCHEDULES = "tests.workers.mutants_of_streams", "tests.workers.mutants"
MUTANTS: dict[str, Mutant] = {
    "schedule: no join": _mutant({CONTRACT, LATE_GATHER, SANITIZER}, schedule=f"{SCHEDULES}:no_join"),
    "schedule: joins after the read": _mutant({LATE_GATHER, SANITIZER}, {CONTRACT}, schedule=f"{SCHEDULES}:joins_too_late"),
    "schedule: fills the send buffer after the fork": _mutant(
        {LATE_MAIN, SANITIZER}, {CONTRACT, LATE_GATHER}, schedule=f"{SCHEDULES}:no_fork"
    ),
    "lanes: join without a wait": _mutant({LATE_GATHER, SANITIZER}, {CONTRACT}, lanes=JoinsWithoutWait),
    "lanes: done before the work": _mutant({LATE_GATHER, SANITIZER}, {CONTRACT}, lanes=DoneBeforeTheWork),
    "lanes: no fork": _mutant({LATE_MAIN, SANITIZER}, {CONTRACT}, lanes=ForksWithoutEvent),
    "lanes: no fork, deferred": _mutant({LATE_MAIN, SANITIZER}, {CONTRACT}, lanes=ForksWithoutEvent, schedule="overlap_rotate"),
    "fabric: reorders on the main stream": _mutant({LATE_GATHER, SANITIZER}, {CONTRACT}, spoil=reorders_on_the_main_stream),
    "memory: keys freed at the fork": _mutant({LATE_GATHER}, {CONTRACT, SANITIZER}, schedule=f"{HERE}:frees_keys_early"),
    SHARED: _mutant(
        {LATE_MAIN, SANITIZER},
        {CONTRACT},
        schedule=f"{HERE}:reads_the_last_layers_keys",
        spoil=shares_a_destination,
        layers=CHAIN,
    ),
    "chain: join without a wait": _mutant({LATE_GATHER, SANITIZER}, {CONTRACT}, lanes=JoinsWithoutWait, layers=CHAIN),
}
RIGHT: dict[str, Mutant] = {
    "overlap_again": _mutant(set(), schedule=f"{SCHEDULES}:overlap_again"),
    "forks_its_own": _mutant(set(), schedule=f"{SCHEDULES}:forks_its_own"),
    "allocates_during_the_gather": _mutant(set(), schedule=f"{HERE}:allocates_during_the_gather"),
    "reads_the_last_layers_keys": _mutant(set(), schedule=f"{HERE}:reads_the_last_layers_keys", layers=CHAIN),
    "one destination": _mutant(set(), spoil=shares_a_destination, layers=CHAIN),
}
"""What looks like one of the mutants and is right. One destination for all layers harms nobody who reads it before the next fork."""


def late_gather(place: str) -> float:
    return LATE_US if place == "side: before the gather" else 0.0


def late_main(place: str) -> float:
    return LATE_US / 10 if place in {"wk", "fused_k", "after the fork"} else 0.0


def seen_in_process(cell: PreparedCell) -> set[str]:
    """Which detectors without a sanitizer see the arm `mutant`; every input in turn, so that no run finds its own keys lying about."""
    lanes, found = cell.lanes, set()
    assert isinstance(lanes, HeldLanes)
    for name, holds_us in ((LATE_GATHER, late_gather), (LATE_MAIN, late_main)):
        for index in range(cell.pool.num_inputs):
            lanes.holds_us = holds_us
            outcome = cell.run(Variant("mutant"), 0, index, Scope.QK)
            lanes.holds_us = lambda place: 0.0
            if outcome.fault is not None:
                found.add(CONTRACT)
            if cell.problem("mutant", replace(outcome, fault=None), 0, index) is not None:
                found.add(name)
    return found


# Under the sanitizer


def _sanitized_mutants() -> None:
    """Prints which mutants, and which right schedules, the sanitizer stops."""
    from torch.cuda._sanitizer import CUDASanitizerErrors

    for name, mutant in {**MUTANTS, **RIGHT}.items():
        with mutant.made_ready() as cell:
            verdict = "clean"
            try:
                for index in range(cell.pool.num_inputs):
                    cell.run(Variant("mutant"), 0, index, Scope.QK)
            except CUDASanitizerErrors:
                verdict = "stopped"
            torch.cuda.synchronize()
        print(f"{name} = {verdict}", flush=True)


def _sanitized_shipped() -> None:
    """Runs every shipped arm, drained and streaming, over both movers, to top-k, and every control over one of them; a race raises."""
    everything, alone = tuple(Control), (Control.NONE,)
    for link, layers, controls in ((NVLINK, 1, everything), (NIC, 1, alone), (NVLINK, CHAIN, alone), (NIC, CHAIN, everything)):
        arms = shipped_arms(layers)
        with made_ready(one_rank_cell(step_of((0, 401), (70, 130)), link=link, layers=layers), arms) as cell:
            select_all(cell)
            num_runs = 0
            for arm in arms:
                for control in controls:
                    assert wrong_in(cell, Variant(arm, control), cell.next_input()) == [], (arm, control)
                    num_runs += 1
        print(f"{link} {layers} = clean, {num_runs} runs", flush=True)


def _on_side(lanes: CudaLanes) -> AbstractContextManager[None]:
    torch.cuda.synchronize()
    return torch.cuda.stream(lanes.side)


def _plain_race(lanes: CudaLanes) -> None:
    x = torch.zeros(64, device="cuda")
    with _on_side(lanes):
        x.fill_(1)
    x + x


def _event_wait(lanes: CudaLanes) -> None:
    x, event = torch.zeros(64, device="cuda"), torch.cuda.Event()
    with _on_side(lanes):
        x.fill_(1)
        event.record()
    lanes.main.wait_event(event)
    x + x


def _host_polls(lanes: CudaLanes) -> None:
    x = torch.zeros(64, device="cuda")
    with _on_side(lanes):
        x.fill_(1)
    lanes.drain()
    x + x


def _view_at_an_offset(lanes: CudaLanes) -> None:
    x = torch.zeros(64, device="cuda")
    with _on_side(lanes):
        x[1:].fill_(1)
    x + x


def _kernel_that_is_no_operator(lanes: CudaLanes) -> None:
    from workers.kernels.clock import stamp

    at_1 = torch.zeros(1, dtype=torch.int64, device="cuda")
    with _on_side(lanes):
        stamp(at_1)
    at_1 + at_1


def _freed_and_given_again(lanes: CudaLanes) -> None:
    x = torch.zeros(1 << 20, device="cuda")
    at = x.data_ptr()
    with _on_side(lanes):
        x + 1
    del x
    y = torch.ones(1 << 20, device="cuda")
    assert y.data_ptr() == at


def _another_thread(lanes: CudaLanes) -> None:
    x = torch.zeros(64, device="cuda")

    def work() -> None:
        with torch.cuda.stream(lanes.side):
            x.fill_(1)

    torch.cuda.synchronize()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    x + x


def _replay_of_a_graph(lanes: CudaLanes) -> None:
    x = torch.zeros(64, device="cuda")
    replay, _ = lanes.capture(lambda: x.fill_(1))
    with _on_side(lanes):
        replay()
    x + x


SIGHTS: dict[str, tuple[Callable[[CudaLanes], None], str]] = {
    "a race": (_plain_race, "stopped"),
    "a wait for an event": (_event_wait, "clean"),
    "a host that polls the streams": (_host_polls, "stopped"),
    "a view at an offset": (_view_at_an_offset, "clean"),
    "a kernel that is no operator": (_kernel_that_is_no_operator, "clean"),
    "memory freed and given again": (_freed_and_given_again, "clean"),
    "another thread": (_another_thread, "clean"),
    "the replay of a graph": (_replay_of_a_graph, "clean"),
}
"""What the sanitizer makes of small programs. All but the waits, of the event and of the polling host, are races."""


def _sights() -> None:
    from torch.cuda._sanitizer import CUDASanitizerErrors

    lanes = CudaLanes(20.0)
    for name, (program, _) in SIGHTS.items():
        verdict = "clean"
        try:
            program(lanes)
        except CUDASanitizerErrors:
            verdict = "stopped"
        torch.cuda.synchronize()
        print(f"{name} = {verdict}", flush=True)


def _captured_without_a_join() -> None:
    """A process of its own: what a capture that failed leaves of the process is nobody's promise."""
    arms = {"baseline": ArmSpec(), "mutant": ArmSpec(schedule=f"{SCHEDULES}:no_join", execution=Execution.CUDA_GRAPH)}
    with made_ready(one_rank_cell(step_of((0, 401))), arms) as cell:
        try:
            cell.run(Variant("mutant"), 0, 0, Scope.QK)
            print("capture = clean", flush=True)
        except RuntimeError as error:
            print(f"capture = stopped\n{error}", flush=True)
    os._exit(0)


PROGRAMS = {
    "mutants": _sanitized_mutants,
    "shipped": _sanitized_shipped,
    "sights": _sights,
    "capture": _captured_without_a_join,
}

if __name__ == "__main__":
    # Schedules are found by their module's name: this one must not be there twice.
    sys.modules[HERE] = sys.modules["__main__"]
    PROGRAMS[sys.argv[1]]()
