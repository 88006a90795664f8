"""A gather plan: who owns which token, and where every gathered row goes. Index arithmetic only; no bytes move here.

Legend: T rows on this rank, S step tokens, c ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from experiments.workload.step import Step


@dataclass(frozen=True)
class GatherPlan:
    """How the keys of one step come together.

    Attributes:
        step: The step that is split.
        cp_size, rank: c and this rank.
        counts: Real rows of every rank; they sum to S when the step is split, and each is S when it is not.
        max_rows: Rows that every rank puts on the wire: its own, zero-padded at the end.
        local_rows_T: int64, the step tokens that this rank owns, in local order.
        source_rows_S: int64, for every step token its row in the gathered buffer [c * max_rows]: trim and re-range in one index.
        blocks: Half-open local row ranges that are contiguous in the step: (first row, end row).
    """

    step: Step
    cp_size: int
    rank: int
    counts: tuple[int, ...]
    max_rows: int
    local_rows_T: torch.Tensor
    source_rows_S: torch.Tensor
    blocks: tuple[tuple[int, int], ...]
    is_split: bool = True

    @property
    def local_tokens(self) -> int:
        """T."""
        return self.counts[self.rank]

    def received_bytes(self, row_bytes: int) -> int:
        """Bytes that arrive at a rank: every other rank's padded rows."""
        return (self.cp_size - 1) * self.max_rows * row_bytes if self.is_split else 0


@dataclass(frozen=True)
class CausalRanges:
    """Positions and visible keys of every step token, in token order.

    Packed keys hold every sequence's prefix and new tokens, one sequence after the other; a token sees keys ks <= n < ke, itself
    included (SGLang `dsa_backend.py`: extend [3, 2] on lengths [10, 4] gives ks 0,0,0,10,10 and ke 8,9,10,13,14).

    Attributes:
        positions_S: int64, position of the token in its request.
        ks_S, ke_S: int32, first visible key and the end (exclusive).
        packed_rows_S: int64, the token's own row among the packed keys.
        prefix_rows: int64, rows of the packed keys that the cached prefixes fill, in sequence order.
    """

    positions_S: torch.Tensor
    ks_S: torch.Tensor
    ke_S: torch.Tensor
    packed_rows_S: torch.Tensor
    prefix_rows: torch.Tensor


def causal_ranges(step: Step) -> CausalRanges:
    """The ranges of a step, from its sequences."""
    positions, starts, own, prefixes = [], [], [], []
    segment = 0
    for sequence in step.sequences:
        end = sequence.prefix_tokens + sequence.new_tokens
        position = torch.arange(sequence.prefix_tokens, end)
        positions.append(position)
        starts.append(torch.full((sequence.new_tokens,), segment))
        own.append(segment + position)
        prefixes.append(torch.arange(segment, segment + sequence.prefix_tokens))
        segment += end
    positions_S, ks_S = torch.cat(positions), torch.cat(starts)
    return CausalRanges(
        positions_S=positions_S,
        ks_S=ks_S.to(torch.int32),
        ke_S=(ks_S + positions_S + 1).to(torch.int32),
        packed_rows_S=torch.cat(own),
        prefix_rows=torch.cat(prefixes),
    )
