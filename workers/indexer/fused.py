"""The indexer with fused stages: RoPE, rotation and quantisation of q in one kernel, norm, RoPE and rotation of k in another.

As where SGLang's DSA indexer fusion is on (#27705; GLM-5's case): q comes rotated out of its projection, so that a schedule's own rotation has
nothing left to do, and a gather launched under it has nothing to hide behind. The same bits as the separate stages: the kernels round where those do.

Legend: T rows on this rank, H heads, D head dim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch

from workers.indexer.indexer import Indexer, KeyCache, Shard

if TYPE_CHECKING:
    from workers.kernels.ops import CudaOps


class FusedIndexer(Indexer):
    """See `Indexer`. CUDA only."""

    _quantised: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
    """Of the last query: rotated q as it was returned, e4m3fn [T, H, D], fp32 [T, H]."""

    @property
    def _kernels(self) -> CudaOps:
        return cast("CudaOps", self.ops)

    def project(self, shard: Shard) -> tuple[torch.Tensor, torch.Tensor]:
        return self.project_q(shard), self.project_k(shard)

    def project_q(self, shard: Shard) -> torch.Tensor:
        """Rotated already."""
        q_THD = super().project_q(shard)
        fused = self._kernels.q_rope_hadamard_quantise
        self._quantised = self.lanes.stage("fused_q", fused, q_THD, shard.cos_TF, shard.sin_TF, self.dims)
        return self._quantised[0]

    def project_k(self, shard: Shard) -> torch.Tensor:
        """Rotated already."""
        w = self.weights
        k_TD = self.lanes.stage("wk", self.ops.project, shard.x_TX, w.wk)
        norm = w.k_norm_weight, w.k_norm_bias
        return self.lanes.stage("fused_k", self._kernels.k_norm_rope_hadamard, k_TD, *norm, shard.cos_TF, shard.sin_TF, self.dims)

    def rope_q(self, q_THD: torch.Tensor, shard: Shard) -> torch.Tensor:
        """Done already."""
        return q_THD

    def rope_k(self, k_TD: torch.Tensor, shard: Shard) -> torch.Tensor:
        """Done already."""
        return k_TD

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """Done already."""
        return x

    def select(self, q_THD: torch.Tensor, shard: Shard, cache: KeyCache) -> torch.Tensor:
        assert self._quantised is not None and self._quantised[0] is q_THD, "a query is projected before it selects"
        _, q8_THD, q_scale_TH = self._quantised
        weights_proj, head_dim = self.weights.weights_proj, self.dims.head_dim
        gates_TH = self.lanes.stage("head_gates", self.ops.head_gates, shard.x_TX, weights_proj, q_scale_TH, head_dim)
        return self.lanes.stage("logits", self._select, q8_THD, gates_TH, shard, cache)
