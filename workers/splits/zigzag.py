"""Zigzag (SGLang's in-seq-split): every sequence in 2c contiguous blocks, rank r owns blocks r and 2c-1-r.

A causal row's work grows with its position, so an early and a late block together even the ranks out. Source: SGLang
`layers/utils/cp_utils.py`, legacy layout.
"""

from __future__ import annotations

import torch

from experiments.workload.step import Step
from workers.splits.plan import GatherPlan


def block_sizes(length: int, num_blocks: int) -> list[int]:
    """Sizes that differ by at most one, the longer blocks first."""
    return [length // num_blocks + (b < length % num_blocks) for b in range(num_blocks)]


def plan_zigzag(step: Step, cp_size: int, rank: int) -> GatherPlan:
    """Local order: all prev blocks in sequence order, then all next blocks."""
    num_blocks = 2 * cp_size
    spans: list[list[tuple[int, int]]] = []
    start = 0
    for sequence in step.sequences:
        blocks = []
        for size in block_sizes(sequence.new_tokens, num_blocks):
            blocks.append((start, start + size))
            start += size
        spans.append(blocks)

    def owned(r: int) -> list[tuple[int, int]]:
        return [blocks[r] for blocks in spans] + [blocks[num_blocks - 1 - r] for blocks in spans]

    counts = tuple(sum(end - begin for begin, end in owned(r)) for r in range(cp_size))
    max_rows = max(counts)
    source_rows_S = torch.empty(step.new_tokens, dtype=torch.int64)
    for r in range(cp_size):
        row = r * max_rows
        for begin, end in owned(r):
            source_rows_S[begin:end] = torch.arange(row, row + end - begin)
            row += end - begin
    local = owned(rank)
    ends = torch.tensor([end - begin for begin, end in local]).cumsum(0).tolist()
    return GatherPlan(
        step=step,
        cp_size=cp_size,
        rank=rank,
        counts=counts,
        max_rows=max_rows,
        local_rows_T=torch.cat([torch.arange(begin, end) for begin, end in local]),
        source_rows_S=source_rows_S,
        blocks=tuple((end - (b - a), end) for end, (a, b) in zip(ends, local, strict=True) if b > a),
    )
