"""What a run would do: cells, ranks, memory, minutes. Nothing is started, and torch stays unloaded."""

from __future__ import annotations

from dataclasses import dataclass

from experiments.names import Scope
from experiments.spec.blocks import rows_per_block
from experiments.spec.cell import KEY_BYTES, Cell
from experiments.spec.experiment import ExperimentSpec
from service.run.orders import control_variants, timed_arms

GEMM_FLOP_PER_US = 1e5
LOGITS_FLOP_PER_US = 5e4
ROTATION_US_PER_ELEMENT = 0.01
WIRE_BYTES_PER_US = 400.0
TRIAL_OVERHEAD_US = 3000.0
LAUNCH_S = 2.0
"""Rough rates of one CPU rank, for an estimate of minutes only."""


@dataclass(frozen=True)
class CellPreview:
    """One cell of a plan."""

    cell: Cell
    bytes_per_rank: int
    trials: int
    minutes: float
    notes: tuple[str, ...]


def preview(spec: ExperimentSpec, cells: tuple[Cell, ...]) -> list[CellPreview]:
    """Every cell with what it costs and what is special about it."""
    plan, controls = spec.measurement, control_variants(spec.arms)
    num_arms = len(timed_arms(spec))
    arms = rows_per_block(num_arms, plan.trials_per_block) * plan.blocks * num_arms
    control = rows_per_block(len(controls), plan.control_trials) * plan.blocks * len(controls)
    warm_up = plan.warmup_trials * (2 * num_arms + len(controls))
    timed = (arms + control) * plan.last_launches
    previews = []
    for cell in cells:
        passes = timed + warm_up * plan.last_launches + 6 * num_arms * plan.last_launches
        seconds = passes * sum(_trial_us(cell, i) for i in range(len(cell.steps))) / 1e6 + LAUNCH_S * plan.last_launches
        notes = []
        if cell.steps_without_cp:
            notes.append(
                f"{cell.steps_without_cp} of {len(cell.steps)} steps too short for {cell.split}: run without CP in every arm"
            )
        if cell.beyond_upstream:
            notes.append("several sequences under zigzag: beyond upstream")
        if cell.is_emulated:
            notes.append("emulated link")
        if cell.layers > 1:
            filler = f", with {cell.filler_us:g} us of filler each" if cell.filler_us else ""
            notes.append(f"a trial is a chain of {cell.layers} layers{filler}")
        if cell.skew_us:
            notes.append(f"the last rank starts {cell.skew_us:g} us late")
        previews.append(CellPreview(cell, cell.bytes_per_rank(plan.inputs), timed, seconds / 60, tuple(notes)))
    return previews


def _trial_us(cell: Cell, index: int) -> float:
    step, dims = cell.steps[index], cell.dims
    local = -(-step.new_tokens // cell.cp_size)
    heads = dims.num_heads * dims.head_dim
    gemm = 2 * local * (heads * dims.q_lora_rank + dims.head_dim * dims.hidden)
    received = KEY_BYTES * local * (cell.cp_size - 1)
    wire_us = cell.fabric.floor_us(received) or received / WIRE_BYTES_PER_US
    select_us = 2 * heads * step.logit_pairs / cell.cp_size / LOGITS_FLOP_PER_US if cell.scope is Scope.INDEXER else 0
    layer_us = gemm / GEMM_FLOP_PER_US + local * heads * ROTATION_US_PER_ELEMENT + wire_us + select_us + cell.filler_us
    return cell.layers * layer_us + cell.skew_us + TRIAL_OVERHEAD_US
