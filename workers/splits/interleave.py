"""Interleave (SGLang's round-robin-split): token i of the concatenated step belongs to rank i mod c.

Only real rows are gathered: a step that c does not divide is padded on the wire, and the pads are dropped by the re-range (CP v2
gathers keys the same way). Source: SGLang `dsa/utils.py`.
"""

from __future__ import annotations

import torch

from experiments.workload.step import Step
from workers.splits.plan import GatherPlan


def plan_interleave(step: Step, cp_size: int, rank: int) -> GatherPlan:
    """Local order: the rank's tokens in step order."""
    tokens = step.new_tokens
    counts = tuple(len(range(r, tokens, cp_size)) for r in range(cp_size))
    max_rows = max(counts)
    token_S = torch.arange(tokens)
    local_rows_T = torch.arange(rank, tokens, cp_size)
    return GatherPlan(
        step=step,
        cp_size=cp_size,
        rank=rank,
        counts=counts,
        max_rows=max_rows,
        local_rows_T=local_rows_T,
        source_rows_S=(token_S % cp_size) * max_rows + token_S // cp_size,
        blocks=((0, len(local_rows_T)),) if len(local_rows_T) else (),
    )
