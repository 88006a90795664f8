"""The stages on meta tensors: every shape is real, and the one stage whose shapes depend on values is given its result's.

Legend: T rows on this rank, S step tokens, N packed keys, H heads, D head dim, K top-k.
"""

from __future__ import annotations

import torch

from workers.indexer.ops import TorchOps
from workers.indexer.stages import RowRange


class SimulatedOps(TorchOps):
    """See `StageOps`."""

    def select(
        self,
        q8_THD: torch.Tensor,
        k8_ND: torch.Tensor,
        k_scale_N: torch.Tensor,
        gates_TH: torch.Tensor,
        ks_T: torch.Tensor,
        ke_T: torch.Tensor,
        topk: int,
        ranges: tuple[RowRange, ...],
    ) -> torch.Tensor:
        return torch.empty(q8_THD.shape[0], topk, dtype=torch.int32, device="meta")

    def store_keys(self, k_SD: torch.Tensor, values_ND: torch.Tensor, scale_N: torch.Tensor, rows_S: torch.Tensor) -> None:
        """Nothing to store."""

    def store_packed(self, packed_SB: torch.Tensor, values_ND: torch.Tensor, scale_N: torch.Tensor, rows_S: torch.Tensor) -> None:
        """Nothing to store."""
