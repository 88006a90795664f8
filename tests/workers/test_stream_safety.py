"""Two streams, held back against each other wherever they may drift, give the bits of one; and whoever drops a wait is caught.

What catches it: the contract of a schedule (`Exchange.fault`), the bits of q and k with one of the lanes held back, or PyTorch's CUDA stream
sanitizer. `mutants_of_streams` says for each mutant which of them must.

The sanitizer follows tensors by their first address through operators of the thread that turned it on. So it sees our kernels, which are
operators with declared mutations, and waits for events, however they were asked for. It does not see a race through a view that begins elsewhere
in the same memory (a rank's own rows within the gathered buffer), by a kernel that is launched as it is (`workers.kernels.clock`), over memory that
was freed and given out again before the other stream had read it, in a thread of its own, or inside the replay of a CUDA graph. And it takes a host
that polls streams until they are idle, as `CudaLanes.drain` does, for one that did not wait. `SIGHTS` holds it to all of this.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.names import Execution, Lane, Schedule, Scope
from experiments.spec.arms import ArmSpec
from tests.workers.mutants_of_streams import (
    CONTRACT,
    LATE_GATHER,
    LATE_MAIN,
    MUTANTS,
    RIGHT,
    SANITIZER,
    SHARED,
    SIGHTS,
    HeldLanes,
    hold_wire,
    seen_in_process,
)
from tests.workers.one_gpu import (
    CHAIN,
    HAS_CUDA,
    NIC,
    NVLINK,
    VERIFY,
    made_ready,
    one_rank_cell,
    select_all,
    shipped_arms,
    step_of,
    wrong_in,
)
from workers.messages import Variant
from workers.verify import verify_cell
from workers.wrapped_lanes import LateLanes, on_lanes

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAS_CUDA, reason="needs a CUDA device")]

PLACES = (
    "side: before the gather",
    "side: before the wire",
    "side: after the wire",
    "side: after the gather",
    "after the fork",
    "before the join",
    "after the join",
    "wk",
    "wq_b",
    "rope",
    "rotate_k",
    "rotate_q",
    "quantise",
    "carry",
)
"""Where a lane is held back; the last ones are stages, wherever they run."""
HOLD_US = 1500.0
"""Longer than a layer."""


@pytest.fixture(scope="module", params=[(NVLINK, 1), (NIC, 1), (NVLINK, CHAIN), (NIC, CHAIN)], ids=lambda p: f"{p[0]}-{p[1]}")
def held(request):
    """A cell of all shipped arms on lanes that can be held back, with its right results made."""
    link, layers = request.param
    arms = shipped_arms(layers)
    arms["graph"] = ArmSpec(schedule=Schedule.OVERLAP_QUERY, execution=Execution.CUDA_GRAPH)
    cell = one_rank_cell(step_of((0, 401), (70, 130)), link=link, plays="last", layers=layers)
    with made_ready(cell, arms, HeldLanes) as ready:
        select_all(ready)
        hold_wire(ready)
        yield ready
        ready.lanes.holds_us = lambda place: 0.0


def check_all_arms(cell, inputs: int) -> None:
    for arm in cell.arms:
        if arm != "graph":  # its holds would be part of the graph
            for _ in range(inputs):
                assert wrong_in(cell, Variant(arm), cell.next_input()) == [], arm


@pytest.mark.parametrize("place", PLACES)
def test_a_lane_held_back_anywhere_changes_no_bit(held, place):
    held.lanes.holds_us = lambda at: HOLD_US if at == place else 0.0
    held.lanes.num_holds = 0
    check_all_arms(held, inputs=2)
    assert held.lanes.num_holds or (place == "carry" and not held.is_chain)


@pytest.mark.parametrize("seed", range(4))
def test_lanes_held_back_at_random_change_no_bit(held, seed):
    """Everywhere by chance: most places for no time at all, others for one that lets either lane overtake the other."""
    draw = random.Random(seed)
    held.lanes.holds_us = lambda at: draw.choice([0.0, 0.0, 0.0, 20.0, 100.0, 600.0])
    check_all_arms(held, inputs=2)


@pytest.mark.parametrize("late", Lane)
def test_a_lane_that_is_late_inside_a_graph_changes_no_bit(held, late):
    held.lanes.holds_us = lambda at: 0.0
    with on_lanes(held, LateLanes(held.lanes, late, HOLD_US)):
        for index in (0, 1, 0):
            assert wrong_in(held, Variant("graph"), index) == []
    assert wrong_in(held, Variant("graph"), 0) == []


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_seen_by_whom_they_must(name):
    mutant = MUTANTS[name]
    with mutant.made_ready() as cell:
        seen = seen_in_process(cell)
        assert cell.problem("baseline", cell.run(Variant("baseline"), 0, 0, Scope.QK), 0, 0) is None
    in_process = {CONTRACT, LATE_GATHER, LATE_MAIN}
    assert mutant.seen_by & in_process <= seen
    assert not mutant.blind & seen


@pytest.mark.parametrize("name", MUTANTS)
def test_verification_sees_every_mutant(name):
    with MUTANTS[name].made_ready() as cell:
        assert {fault.arm for fault in verify_cell(cell, VERIFY, 0, deep=False).faults} == {"mutant"}


@pytest.mark.parametrize("name", RIGHT)
def test_what_only_looks_like_a_mutant_is_right(name):
    with RIGHT[name].made_ready() as cell:
        assert seen_in_process(cell) == set()
        assert verify_cell(cell, VERIFY, 0, deep=False).faults == ()


@pytest.mark.parametrize("name", [name for name in MUTANTS if name != SHARED])
def test_verification_alone_calls_a_mutant_invalid(name):
    """It holds no main lane back; but every trial begins behind a device that sleeps, where a side lane that does not wait runs ahead. A buffer
    that the next layer's gather writes too early is beyond that: seen once in six verifications."""
    with MUTANTS[name].made_ready() as cell:
        assert {fault.arm for fault in verify_cell(cell, VERIFY, 0, deep=False).faults} == {"mutant"}


def run_apart(program: str, sanitizer: bool = True) -> dict[str, str]:
    """A program of `mutants_of_streams` in a process of its own: what it says of each of its cases."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.workers.mutants_of_streams", program],
        check=False,
        cwd=ROOT,
        env={**os.environ, **({"TORCH_CUDA_SANITIZER": "1"} if sanitizer else {})},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return dict(line.split(" = ", 1) for line in done.stdout.splitlines() if " = " in line)


def test_the_sanitizer_finds_nothing_in_what_is_shipped():
    said = run_apart("shipped")
    assert len(said) == 4
    assert all(verdict.startswith("clean, ") for verdict in said.values())


def test_the_sanitizer_stops_mutants():
    said = run_apart("mutants")
    assert set(said) == {*MUTANTS, *RIGHT}
    for name, mutant in MUTANTS.items():
        if SANITIZER in mutant.seen_by | mutant.blind:
            assert said[name] == ("stopped" if SANITIZER in mutant.seen_by else "clean"), name
    assert {said[name] for name in RIGHT} == {"clean"}


def test_what_the_sanitizer_sees_and_what_it_does_not():
    assert run_apart("sights") == {name: verdict for name, (_, verdict) in SIGHTS.items()}


def test_a_graph_cannot_be_captured_without_its_join():
    """A detector of its own: a graph ends when both streams have come together."""
    assert run_apart("capture", sanitizer=False)["capture"] == "stopped"
