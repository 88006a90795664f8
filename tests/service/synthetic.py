"""Sweeps that nobody measured: records with planted times, for whatever reads records."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments.names import SweepStatus
from experiments.spec.cell import Cell
from experiments.spec.experiment import ExperimentSpec
from service.judge.results import SweepResult
from service.run.orders import ARMS, CONTROLS, block_of, control_variants, timed_arms
from service.store.home import Home
from service.store.judged import load_result
from service.store.records import Records
from workers.messages import BlockReport, Fault, TrialRow, Variant, VerifyReport

GATHER_US = 200.0
COMPUTE_US = 800.0
HIDDEN = {"baseline": 0.0, "_aa": 0.0}
"""Share of the gather that an arm hides; 0.75 for any arm not named."""

TASKS = {ARMS: "measure", CONTROLS: "control"}

ENVIRONMENT: dict[str, Any] = {
    "revision": "0123456789abcdef0123456789abcdef01234567",
    "dirty": False,
    "source_digest": "0123456789ab",
    "versions": {"python": "3.11", "torch": "2.9", "ray": "2.60", "mlflow": "3.17"},
    "host": "planted",
    "cpu": "a planted CPU",
    "cores": 2,
    "command": ["cplab", "run", "planted"],
}


def make_spec(num_cells: int = 2, **changes: Any) -> ExperimentSpec:
    """A spec with that many cells (an even number: two fabrics), two arms, and light measurement."""
    assert num_cells % 2 == 0
    values: dict[str, Any] = {
        "name": "planted",
        "dims": "mini",
        "workload": {"kind": "grid", "new_tokens": [64 * (i + 1) for i in range(num_cells // 2)]},
        "cells": {"cp_size": 2, "split": "zigzag", "fabric": ["process_group", "emulated_20mbit"]},
        "arms": {"baseline": {"schedule": "serial"}, "overlapped": {"schedule": "overlap_rotate"}},
        "measurement": {"launches": 5, "blocks": 1, "trials_per_block": 2, "control_trials": 2},
    }
    return ExperimentSpec.model_validate(values | changes)


def make_sweep(
    home: Home,
    spec: ExperimentSpec,
    sweep_id: str = "20260102-030405-abcd",
    invalid: Sequence[int] = (),
    launches: int | None = None,
    status: SweepStatus = SweepStatus.FINISHED,
    scale: Callable[[Cell], float] = lambda _: 1.0,
) -> tuple[Records, SweepResult]:
    """Records of an ended sweep with planted trials, and the result judged from them.

    Args:
        invalid: Positions of cells that a check has found wrong.
        launches: How many were measured, when the sweep was cut short.
        scale: Of all of a cell's times.
    """
    rng = random.Random(7)
    records = Records(home.records)
    cells = spec.expand().cells
    records.start_sweep(sweep_id, spec, cells, ENVIRONMENT, None)
    plan = spec.measurement
    for launch in range(plan.launches if launches is None else launches):
        for cp_size in spec.cells.cp_size:
            ranks = [{"rank": rank, "node_id": "n", "hostname": "planted-host", "cores": 2} for rank in range(cp_size)]
            records.add_launch(sweep_id, cp_size, launch, ranks, 1.0)
        for position, cell in enumerate(cells):
            records.set_path(sweep_id, cell.cell_id, "gloo", cell.fabric.floor_us(1000))
            checks = [VerifyReport(rank, (), (1,), 10, 1.0, 0.99) for rank in range(cell.cp_size)]
            records.add_verification(sweep_id, cell.cell_id, launch, "verify", checks)
            if position in invalid:
                records.add_faults(sweep_id, cell.cell_id, [Fault("overlapped", "keys", "rank 1 differs | in 3 rows")])
            for kind, variants, trials in (
                (ARMS, list(timed_arms(spec)), plan.trials_per_block),
                (CONTROLS, control_variants(spec.arms), plan.control_trials),
            ):
                for block in range(plan.blocks):
                    orders = block_of(variants, trials, len(cell.steps), cell.cell_id, launch, kind, block).orders
                    reports = [
                        BlockReport(rank, tuple(_row(o.variant, o.row, o.step, rng, scale(cell)) for o in orders), (), 1000.0)
                        for rank in range(cell.cp_size)
                    ]
                    records.add_block(sweep_id, cell.cell_id, launch, kind, block, reports, 5000.0)
                    records.add_spent(sweep_id, cell.cell_id, cell.cp_size, launch, TASKS[kind], block, 0.006)
    records.end_sweep(sweep_id, status, "" if status is SweepStatus.FINISHED else "ended by a planted cause")
    return records, load_result(records, sweep_id)


def _row(key: str, row: int, step: int, rng: random.Random, scale: float) -> TrialRow:
    variant = Variant.parse(key)
    gather_us, compute_us = scale * GATHER_US * rng.uniform(0.99, 1.01), scale * COMPUTE_US
    exposed_us = gather_us * (1 - HIDDEN.get(variant.arm, 0.75))
    elapsed_us = {
        "none": compute_us + exposed_us,
        "prefilled": compute_us,
        "zero_byte": compute_us + 5,
        "gather_alone": gather_us,
    }[variant.control] + rng.uniform(0, 2)
    runs_gather = variant.control in ("none", "gather_alone")
    return TrialRow(
        variant=key,
        row=row,
        step=step,
        elapsed_us=elapsed_us,
        start_us=0.0,
        window_us=0.0 if variant.arm in HIDDEN else 0.75 * GATHER_US * scale,
        gather_us=gather_us if runs_gather else None,
        wire_us=0.9 * gather_us if runs_gather else None,
        arrival_us=rng.uniform(0, 3) if runs_gather else None,
        late_us=rng.uniform(0, 1) if runs_gather else None,
    )


def home_in(folder: Path) -> Home:
    folder.mkdir(parents=True, exist_ok=True)
    return Home(folder)
