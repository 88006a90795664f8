"""What ties the layers of a chain together: each one's inputs depend on what the layer before it gathered and returned.

Legend: T rows on this rank, S step tokens, H heads, D head dim, X hidden, R q_lora rank.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from workers.indexer.indexer import Shard

SIGN_BIT = -0x8000
"""The sign of a bf16, as int16."""


def carry(shard: Shard, q_THD: torch.Tensor, k_SD: torch.Tensor) -> Shard:
    """The inputs of the next layer: this layer's, bf16 [T, X] and [T, R], with signs flipped by its outputs: q, bf16 [T, H, D], and k
    as it travelled, bf16 [S, D] or packed uint8 [S, 132].

    Every gathered row takes part in the signs of all hidden states, and a token's first rotated head in those of its own compressed query.
    So a layer that read stale or unwritten keys, or ran before its predecessor had ended, leaves its mark on every layer after it. Flipped
    signs keep a value's size and are the same bits on every device: the sums are of integers, whose order does not matter.
    """
    row_bytes = k_SD.shape[1] * k_SD.element_size()
    sums = k_SD.contiguous().view(torch.int64 if row_bytes % 8 == 0 else torch.int32).sum(0).view(torch.int16)
    return replace(
        shard,
        x_TX=_flip(shard.x_TX, sums.expand(1, -1)),
        q_lora_TR=_flip(shard.q_lora_TR, q_THD[:, 0].contiguous().view(torch.int16)),
    )


def _flip(rows: torch.Tensor, marks: torch.Tensor) -> torch.Tensor:
    """bf16 [T, W], each sign turned where the mark over it, int16 [T or 1, D] repeated over W, has its top bit set."""
    width = rows.shape[1]
    signs = (marks & SIGN_BIT).repeat(1, -(-width // marks.shape[1]))[:, :width]
    return (rows.view(torch.int16) ^ signs).view(torch.bfloat16)
