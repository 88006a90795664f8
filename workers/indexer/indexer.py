"""One rank's lightning indexer: the stages, bound to weights and run on lanes.

Legend: T rows on this rank, S step tokens, N packed keys, H heads, D head dim, K top-k, X hidden, R q_lora rank, F rope_dim / 2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from experiments.spec.dims import DimsSpec
from workers.indexer.ops import StageOps
from workers.indexer.stages import RowRange
from workers.indexer.weights import IndexerWeights
from workers.lanes import Lanes


@dataclass(frozen=True)
class Shard:
    """What one rank brings to a step.

    Attributes:
        x_TX: bf16, hidden states of the rank's tokens.
        q_lora_TR: bf16, compressed queries.
        cos_TF, sin_TF: fp32 rotary tables at the tokens' global positions.
        ks_T, ke_T: int32, visible keys of each row among the packed keys.
        ranges: Of rows whose logits are made in one go.
    """

    x_TX: torch.Tensor
    q_lora_TR: torch.Tensor
    cos_TF: torch.Tensor
    sin_TF: torch.Tensor
    ks_T: torch.Tensor
    ke_T: torch.Tensor
    ranges: tuple[RowRange, ...] = ()


@dataclass
class KeyCache:
    """Quantised index keys of a step's sequences, packed: prefix and new tokens, sequence after sequence.

    132 B a token as in SGLang's index-K cache; kept dense here, since pages change addresses and no value.

    Attributes:
        values_ND: e4m3fn.
        scale_N: fp32.
        new_rows_S: int64, where the step's own tokens go.
    """

    values_ND: torch.Tensor
    scale_N: torch.Tensor
    new_rows_S: torch.Tensor


class Indexer:
    """The stages as a schedule calls them."""

    def __init__(self, dims: DimsSpec, weights: IndexerWeights, lanes: Lanes, ops: StageOps) -> None:
        self.dims, self.weights, self.lanes, self.ops = dims, weights, lanes, ops

    def project(self, shard: Shard) -> tuple[torch.Tensor, torch.Tensor]:
        """q, bf16 [T, H, D], and k, bf16 [T, D]: projected, k normalised, both with RoPE at the rank's global positions, in one call."""
        q_THD, k_TD = self.project_q(shard), self.project_k(shard)
        return self.lanes.stage("rope", self.ops.rope, q_THD, k_TD, shard.cos_TF, shard.sin_TF, self.dims)

    def project_q(self, shard: Shard) -> torch.Tensor:
        """q without RoPE, bf16 [T, H, D]."""
        q = self.lanes.stage("wq_b", self.ops.project, shard.q_lora_TR, self.weights.wq_b)
        return q.view(-1, self.dims.num_heads, self.dims.head_dim)

    def project_k(self, shard: Shard) -> torch.Tensor:
        """Normalised k without RoPE, bf16 [T, D]."""
        w = self.weights
        k_TD = self.lanes.stage("wk", self.ops.project, shard.x_TX, w.wk)
        return self.lanes.stage("norm_k", self.ops.norm_k, k_TD, w.k_norm_weight, w.k_norm_bias)

    def rope_q(self, q_THD: torch.Tensor, shard: Shard) -> torch.Tensor:
        """RoPE of q alone, bf16 [T, H, D]; the same bits as in `project`."""
        return self.lanes.stage("rope_q", self.ops.rope_one, q_THD, shard.cos_TF, shard.sin_TF, self.dims)

    def rope_k(self, k_TD: torch.Tensor, shard: Shard) -> torch.Tensor:
        """RoPE of k alone, bf16 [T, D]; the same bits as in `project`."""
        return self.lanes.stage("rope_k", self.ops.rope_one, k_TD, shard.cos_TF, shard.sin_TF, self.dims)

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """Hadamard rotation of q, bf16 [T, H, D], or k, bf16 [T, D]."""
        return self.lanes.stage("rotate_q" if x.dim() == 3 else "rotate_k", self.ops.hadamard, x)

    def copy(self, x: torch.Tensor) -> torch.Tensor:
        """A copy, whatever its strides are."""
        return self.lanes.stage("copy", torch.clone, x)

    def pack(self, k_TD: torch.Tensor) -> torch.Tensor:
        """Rotated keys quantised for the wire: bf16 [T, D] to uint8 [T, 132], 128 values and an fp32 scale."""
        return self.lanes.stage("quantise", self.ops.pack_keys, k_TD)

    def store_keys(self, k_SD: torch.Tensor, cache: KeyCache) -> None:
        """Puts the gathered keys, bf16 [S, D] or packed uint8 [S, 132], into the cache, which then holds every token's key."""
        store = self.ops.store_packed if k_SD.dtype == torch.uint8 else self.ops.store_keys
        self.lanes.stage("quantise", store, k_SD, cache.values_ND, cache.scale_N, cache.new_rows_S)

    def select(self, q_THD: torch.Tensor, shard: Shard, cache: KeyCache) -> torch.Tensor:
        """int32 [T, K]: for each of the rank's rows, the positions of its best keys in its request."""
        q8_THD, q_scale_TH = self.lanes.stage("quantise", self.ops.quantise_q, q_THD)
        weights_proj, head_dim = self.weights.weights_proj, self.dims.head_dim
        gates_TH = self.lanes.stage("head_gates", self.ops.head_gates, shard.x_TX, weights_proj, q_scale_TH, head_dim)
        return self.lanes.stage("logits", self._select, q8_THD, gates_TH, shard, cache)

    def _select(self, q8_THD: torch.Tensor, gates_TH: torch.Tensor, shard: Shard, cache: KeyCache) -> torch.Tensor:
        keys = cache.values_ND, cache.scale_N
        return self.ops.select(q8_THD, *keys, gates_TH, shard.ks_T, shard.ke_T, self.dims.topk, shard.ranges)
