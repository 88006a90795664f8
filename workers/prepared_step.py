"""A step made ready on one rank: its plan, its tables and row ranges on the device, and the destinations of its gathers.

Legend: T rows on this rank, S step tokens, D head dim, F rope_dim / 2.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch

from experiments.names import Payload
from experiments.spec.cell import Cell
from experiments.spec.dims import CACHE_BYTES_PER_TOKEN
from workers.indexer.rope import RotaryTable
from workers.indexer.stages import RowRange, row_ranges
from workers.splits import plan
from workers.splits.plan import CausalRanges, GatherPlan, causal_ranges


@dataclass(frozen=True)
class PreparedStep:
    """One step on one rank."""

    plan: GatherPlan
    ranges: CausalRanges
    rows_T: torch.Tensor
    """The plan's local rows, on the device."""
    cos_TF: torch.Tensor
    sin_TF: torch.Tensor
    ks_T: torch.Tensor
    ke_T: torch.Tensor
    logits: tuple[RowRange, ...]
    new_rows_S: torch.Tensor
    outs: dict[Payload, tuple[torch.Tensor, ...]]
    """Destination of each layer's gather, bf16 [S, D] or packed uint8 [S, 132], poisoned before every run."""


def prepare_step(
    cell: Cell,
    index: int,
    rank: int,
    rope: RotaryTable,
    device: torch.device,
    payloads: Collection[Payload],
    bytes_per_logit: int,
    logits_mib: int,
) -> PreparedStep:
    """Step `index` of a cell. `bytes_per_logit`, `logits_mib`: see `row_ranges`."""
    step = cell.steps[index]
    gather_plan, ranges = plan(cell.split, step, cell.cp_size, rank), causal_ranges(step)
    rows_T = gather_plan.local_rows_T
    cos_TF, sin_TF = rope.cos_sin(ranges.positions_S[rows_T])
    shapes = {Payload.BF16: (cell.dims.head_dim, torch.bfloat16), Payload.FP8: (CACHE_BYTES_PER_TOKEN, torch.uint8)}
    return PreparedStep(
        plan=gather_plan,
        ranges=ranges,
        rows_T=rows_T.to(device),
        cos_TF=cos_TF.to(device),
        sin_TF=sin_TF.to(device),
        ks_T=ranges.ks_S[rows_T].to(device),
        ke_T=ranges.ke_S[rows_T].to(device),
        logits=row_ranges(ranges.ke_S[rows_T], step.kv_tokens, bytes_per_logit, logits_mib),
        new_rows_S=ranges.packed_rows_S.to(device),
        outs={
            payload: tuple(torch.empty(step.new_tokens, width, dtype=dtype, device=device) for _ in range(cell.layers))
            for payload, (width, dtype) in shapes.items()
            if payload in payloads
        },
    )
