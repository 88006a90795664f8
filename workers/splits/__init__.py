"""Splits: which rank owns which token, as gather plans. `SPLITS` registers a planner under every name of the vocabulary."""

from __future__ import annotations

from collections.abc import Callable

import torch

from experiments.names import Split
from experiments.spec.eligibility import why_not
from experiments.workload.step import Step
from workers.splits.interleave import plan_interleave
from workers.splits.plan import GatherPlan
from workers.splits.zigzag import plan_zigzag

SPLITS: dict[Split, Callable[[Step, int, int], GatherPlan]] = {
    Split.ZIGZAG: plan_zigzag,
    Split.INTERLEAVE: plan_interleave,
}


def plan_unsplit(step: Step, cp_size: int, rank: int) -> GatherPlan:
    """The step without CP: every rank owns every token and nothing is gathered."""
    tokens = step.new_tokens
    return GatherPlan(
        step=step,
        cp_size=cp_size,
        rank=rank,
        counts=(tokens,) * cp_size,
        max_rows=tokens,
        local_rows_T=torch.arange(tokens),
        source_rows_S=torch.arange(tokens),
        blocks=((0, tokens),),
        is_split=False,
    )


def plan(split: Split, step: Step, cp_size: int, rank: int) -> GatherPlan:
    """The plan of one rank; a step that the split cannot take runs without CP."""
    if why_not(split, step, cp_size):
        return plan_unsplit(step, cp_size, rank)
    return SPLITS[split](step, cp_size, rank)
