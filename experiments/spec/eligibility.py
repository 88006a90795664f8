"""Which steps a split can take: index arithmetic that plans and refusals share.

Source: SGLang's conditions (in-seq-split: every sequence at least 2c new tokens, else the whole batch runs without CP;
round-robin-split: the step at least c).
"""

from __future__ import annotations

from experiments.names import Split
from experiments.workload.step import Step


def why_not(split: Split, step: Step, cp_size: int) -> str | None:
    """Why the step cannot be split over `cp_size` ranks; None when it can."""
    if cp_size == 1:
        return None
    if split is Split.ZIGZAG:
        shortest = min(s.new_tokens for s in step.sequences)
        if shortest < 2 * cp_size:
            return f"zigzag needs at least 2 x cp_size = {2 * cp_size} new tokens in every sequence; the shortest has {shortest}"
    elif step.new_tokens < cp_size:
        return f"interleave needs at least cp_size = {cp_size} new tokens in a step; it has {step.new_tokens}"
    return None


def is_beyond_upstream(split: Split, step: Step) -> bool:
    """Several sequences under zigzag: SGLang reads only the first one's metadata there and warns of accuracy issues."""
    return split is Split.ZIGZAG and len(step.sequences) > 1
