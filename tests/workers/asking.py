"""Asks a rank group about one cell, as the controller would."""

from __future__ import annotations

from collections.abc import Mapping

from experiments.spec.arms import ArmSpec
from experiments.spec.cell import Cell
from experiments.spec.measurement import VerifySpec
from experiments.spec.simulation import SimulationSpec
from experiments.spec.weights import WeightsSpec
from service.run.orders import arms_with_serial
from service.run.rank_group import RankGroup
from tests.conftest import BOTH_ARMS
from workers.messages import BlockReport, Fault, PrepareCell, RunBlock, TrialOrder, VerifyCell, VerifyReport


def prepare(group: RankGroup, cell: Cell, arms: Mapping[str, ArmSpec] = BOTH_ARMS, seed: int = 0, **changes: object) -> None:
    """Prepares the cell on all ranks."""
    values: dict = {
        "cell": cell,
        "arms": arms_with_serial(arms),
        "weights": WeightsSpec(),
        "seed": seed,
        "num_inputs": 3,
        "verify": VerifySpec(),
        "simulation": SimulationSpec(),
        **changes,
    }
    group.ask(PrepareCell(**values), 60)


def verify(group: RankGroup, deep: bool = True) -> list[VerifyReport]:
    """Every rank's report."""
    return [report for report in group.ask(VerifyCell(deep), 120) if isinstance(report, VerifyReport)]


def faults(group: RankGroup, deep: bool = True) -> list[Fault]:
    return [fault for report in verify(group, deep) for fault in report.faults]


def run_block(group: RankGroup, variants: list[str], trials: int = 4, num_steps: int = 1) -> list[BlockReport]:
    """A plain block: the variants in turn."""
    orders = tuple(TrialOrder(v, row, step) for row in range(trials) for step in range(num_steps) for v in variants)
    return [report for report in group.ask(RunBlock(orders), 120) if isinstance(report, BlockReport)]
