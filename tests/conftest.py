"""What tests of all floors share: small cells, and rank groups that end with the test."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

from experiments.names import Device, Regime, Scope, Split
from experiments.spec.arms import ArmSpec
from experiments.spec.cell import Cell
from experiments.spec.dims import PRESETS as DIMS
from experiments.spec.dims import DimsSpec
from experiments.spec.fabric import PRESETS as FABRICS
from experiments.workload.step import Sequence, Step
from service.run.local_ranks import local_group
from service.run.rank_group import RankGroup

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
settings.register_profile("cplab", deadline=None)  # a first call may import scipy
settings.load_profile("cplab")

TINY = DimsSpec(name="tiny", hidden=64, q_lora_rank=32, num_heads=4, topk=8, num_layers=1)


def make_step(*sequences: tuple[int, int]) -> Step:
    """A step of (prefix_tokens, new_tokens) pairs."""
    return Step(tuple(Sequence(prefix, new) for prefix, new in sequences))


def make_cell(
    *steps: Step,
    split: Split = Split.INTERLEAVE,
    cp_size: int = 2,
    fabric: str = "process_group",
    scope: Scope = Scope.QK,
    dims: DimsSpec = TINY,
    device: Device = Device.CPU,
    skew_us: float = 0.0,
    layers: int = 1,
    filler_us: float = 0.0,
) -> Cell:
    """A cell over those steps (one of 64 tokens when none is given); streaming when it has more than one layer."""
    return Cell(
        workload_label="test",
        steps=steps or (make_step((0, 64)),),
        is_replay=len(steps) > 1,
        split=split,
        cp_size=cp_size,
        fabric=FABRICS[fabric],
        scope=scope,
        regime=Regime.STREAMING if layers > 1 else Regime.DRAINED,
        dims=dims,
        device=device,
        skew_us=skew_us,
        layers=layers,
        filler_us=filler_us,
    )


BOTH_ARMS = {"baseline": ArmSpec(), "overlapped": ArmSpec(schedule="overlap_rotate")}
MINI = DIMS["mini"]


@pytest.fixture
def groups() -> Iterator[list[RankGroup]]:
    """Groups that a test appends here are closed after it."""
    opened: list[RankGroup] = []
    yield opened
    for group in opened:
        group.close()


@pytest.fixture(scope="module")
def pair() -> Iterator[RankGroup]:
    """Two launched ranks for tests that leave them alive."""
    group = local_group(2)
    group.launch(60, 20, Device.CPU, [os.getcwd()])
    yield group
    group.close()
