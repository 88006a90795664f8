"""One real rank on the GPU of this process: cells made ready here, and what is wrong with a run of one.

Imports nothing that a CPU build lacks: what needs Triton is imported when a cell is made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from experiments.names import Control, Device, Payload, Regime, Schedule, Scope, Split, Stages
from experiments.spec.arms import ArmSpec
from experiments.spec.cell import Cell
from experiments.spec.dims import PRESETS as DIMS
from experiments.spec.fabric import LINKS
from experiments.spec.measurement import VerifySpec
from experiments.spec.simulation import SimulationSpec
from experiments.spec.weights import WeightsSpec
from experiments.workload.step import Sequence, Step
from workers.digest import digest
from workers.fabrics.transport import CollectiveTransport
from workers.lanes.cuda import CudaLanes
from workers.messages import PrepareCell, Variant
from workers.prepared_cell import PreparedCell
from workers.verify import digest_keys, verify_cell

HAS_CUDA = torch.cuda.is_available()
NVLINK, NIC = "nvlink4_hgx_h200", "one_400g_nic_per_node"
"""Links whose peers a kernel plays, and a copy engine."""
VERIFY = VerifySpec(delay_ms=5, rows_per_rank=8)
CHAIN = 3
"""Layers of the tests' chains."""


def step_of(*sequences: tuple[int, int]) -> Step:
    """A step of (prefix_tokens, new_tokens) pairs."""
    return Step(tuple(Sequence(prefix, new) for prefix, new in sequences))


def one_rank_cell(
    *steps: Step,
    split: Split = Split.ZIGZAG,
    cp_size: int = 4,
    link: str = NVLINK,
    plays: str = "first",
    scope: Scope = Scope.INDEXER,
    layers: int = 1,
    dims: str = "mini",
    **rest: float,
) -> Cell:
    """Streaming when it has more than one layer."""
    regime = Regime.STREAMING if layers > 1 else Regime.DRAINED
    fabric, is_replay = LINKS[link][f"{link}_{plays}"], len(steps) > 1
    return Cell("test", steps, is_replay, split, cp_size, fabric, scope, regime, DIMS[dims], Device.CUDA, layers=layers, **rest)


def shipped_arms(layers: int = 1) -> dict[str, ArmSpec]:
    """Every shipped schedule by every set of stages and payload; a chain has no fp8."""
    payloads = [Payload.BF16] if layers > 1 else list(Payload)
    return {
        "baseline": ArmSpec(),
        **{
            f"{schedule}_{stages}_{payload}": ArmSpec(schedule=schedule, stages=stages, payload=payload)
            for schedule in Schedule
            for stages in Stages
            for payload in payloads
        },
    }


@contextmanager
def made_ready(
    cell: Cell,
    arms: Mapping[str, ArmSpec],
    lanes_type: type[CudaLanes] = CudaLanes,
    verify: VerifySpec = VERIFY,
    num_inputs: int = 3,
) -> Iterator[PreparedCell]:
    """The cell on lanes of its own, which are the process's current ones meanwhile: one cell at a time."""
    lanes = lanes_type(20.0)
    try:
        request = PrepareCell(cell, dict(arms), WeightsSpec(), 1, num_inputs, verify, SimulationSpec())
        yield PreparedCell(request, 0, lanes, CollectiveTransport(None, "lo"))
    finally:
        lanes.close()


def select_all(cell: PreparedCell) -> None:
    """Makes what runs are held against, on every step and input; and every arm has run once, so that what compiles has."""
    report = verify_cell(cell, VERIFY, 0, deep=False, late=False)
    assert report.faults == ()


def wrong_in(cell: PreparedCell, variant: Variant, index: int, scope: Scope = Scope.INDEXER, step: int = 0) -> list[str]:
    """What is not as `serial` left it after one run: the contract, q and k, the index keys, the selection. After `verify_cell`."""
    right = cell.selected[cell.settings_of[variant.arm], step, index]
    outcome = cell.run(variant, step, index, scope)
    wrong = []
    if variant.control is Control.GATHER_ALONE:
        # It has no q. The last layer of a chain gathers keys of the first one's inputs: no other run makes them.
        keys = cell.correct(step, index, cell.settings_of[variant.arm]).keys[cell.arms[variant.arm].payload]
        assert outcome.k is not None
        return [] if cell.is_chain or torch.equal(outcome.k, keys[0]) else ["k of the gather alone"]
    if problem := cell.problem(variant.arm, outcome, step, index):
        wrong.append(problem)
    if scope is not Scope.QK and digest_keys(cell, step) != right.keys:
        wrong.append("index keys")
    if scope is Scope.INDEXER:
        assert outcome.topk is not None
        if digest(outcome.topk) != right.topk:
            wrong.append("top-k")
    return wrong
