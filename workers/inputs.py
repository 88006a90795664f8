"""Inputs of a cell: seeded, the same tokens on every rank, and never the same twice in a row.

Legend: T rows on this rank, S step tokens, P prefix tokens, X hidden, R q_lora rank.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from experiments.spec.dims import DimsSpec
from experiments.workload.step import Step, Workload

INPUT_STRIDE = 61
"""Rows between two input sets of the same pool: every token then has another hidden state, and so another key."""
PREFIX_POOL = 8192
PREFIX_CHUNK = 4096
DRAWN_ROWS = 1 << 15
"""Drawn in fp32 at a time."""


class InputPool:
    """Hidden states and compressed queries, bf16 N(0, 1): one pool of rows, of which input set j is a window."""

    def __init__(self, dims: DimsSpec, steps: Workload, num_inputs: int, seed: int, device: torch.device) -> None:
        """Drawn on the device: a GPU draws other numbers than a CPU, or than a GPU with another number of SMs, from the same seed."""
        rows = max(step.new_tokens for step in steps) + (num_inputs - 1) * INPUT_STRIDE
        drawn_on = torch.device("cpu") if device.type == "meta" else device
        generator = torch.Generator(drawn_on).manual_seed(seed)

        def normal(num_rows: int, width: int) -> torch.Tensor:
            drawn = torch.empty(num_rows, width, dtype=torch.bfloat16, device=drawn_on)
            for chunk in drawn.split(DRAWN_ROWS):
                chunk.copy_(torch.randn(chunk.shape, generator=generator, device=drawn_on))
            return drawn.to(device)

        self.x = normal(rows, dims.hidden)
        self.q_lora = normal(rows, dims.q_lora_rank)
        self.num_inputs = num_inputs
        longest = max((s.prefix_tokens for step in steps for s in step.sequences), default=0)
        self._prefix = normal(min(longest, PREFIX_POOL), dims.hidden)

    def x_rows(self, rows: torch.Tensor, index: int) -> torch.Tensor:
        """Hidden states of those step tokens (int64) in input set `index`, bf16 [len(rows), X]."""
        return self.x.index_select(0, rows.to(self.x.device) + index * INPUT_STRIDE)

    def q_lora_rows(self, rows: torch.Tensor, index: int) -> torch.Tensor:
        """Compressed queries of those step tokens, bf16 [len(rows), R]."""
        return self.q_lora.index_select(0, rows.to(self.x.device) + index * INPUT_STRIDE)

    def prefix_chunks(self, step: Step) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The cached prefixes in packed order, as (positions, int64 [n], hidden states, bf16 [n, X]) in bounded chunks.

        Sequence s reads the pool from row 37 s on, so two sequences never share a cached key at the same position.
        """
        for index, sequence in enumerate(step.sequences):
            for start in range(0, sequence.prefix_tokens, PREFIX_CHUNK):
                positions = torch.arange(start, min(start + PREFIX_CHUNK, sequence.prefix_tokens))
                yield positions, self._prefix[((positions + 37 * index) % len(self._prefix)).to(self._prefix.device)]
