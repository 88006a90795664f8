"""One rank's lightning indexer: the stages, bound to weights and run on lanes.

Legend: T rows on this rank, S step tokens, N packed keys, H heads, D head dim, K top-k, X hidden, R q_lora rank, F rope_dim / 2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from experiments.spec.dims import DimsSpec
from workers.indexer import stages
from workers.indexer.rope import apply_rope
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
    """

    x_TX: torch.Tensor
    q_lora_TR: torch.Tensor
    cos_TF: torch.Tensor
    sin_TF: torch.Tensor
    ks_T: torch.Tensor
    ke_T: torch.Tensor


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

    def store(self, values_SD: torch.Tensor, scale_S: torch.Tensor) -> None:
        """Writes the step's own keys."""
        # Bytes are copied: indexed writes know no fp8.
        self.values_ND.view(torch.uint8)[self.new_rows_S] = values_SD.view(torch.uint8)
        self.scale_N[self.new_rows_S] = scale_S


class Indexer:
    """The stages as a schedule calls them."""

    def __init__(self, dims: DimsSpec, weights: IndexerWeights, lanes: Lanes, logits_mib: int) -> None:
        self.dims, self.weights, self.lanes, self.logits_mib = dims, weights, lanes, logits_mib

    def project(self, shard: Shard) -> tuple[torch.Tensor, torch.Tensor]:
        """q, bf16 [T, H, D], and k, bf16 [T, D]: projected, k normalised, both with RoPE at the rank's global positions."""
        run, w, dims = self.lanes.stage, self.weights, self.dims
        q_THD = run("wq_b", stages.project, shard.q_lora_TR, w.wq_b).view(-1, dims.num_heads, dims.head_dim)
        k_TD = run("wk", stages.project, shard.x_TX, w.wk)
        k_TD = run("norm_k", stages.norm_k, k_TD, w.k_norm_weight, w.k_norm_bias)
        return run("rope", self._rope, q_THD, k_TD, shard)

    def _rope(self, q_THD: torch.Tensor, k_TD: torch.Tensor, shard: Shard) -> tuple[torch.Tensor, torch.Tensor]:
        q_THD = apply_rope(q_THD, shard.cos_TF, shard.sin_TF, self.dims)
        return q_THD, apply_rope(k_TD, shard.cos_TF, shard.sin_TF, self.dims)

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """Hadamard rotation of q, bf16 [T, H, D], or k, bf16 [T, D]."""
        return self.lanes.stage("rotate_q" if x.dim() == 3 else "rotate_k", stages.hadamard, x)

    def store_keys(self, k_SD: torch.Tensor, cache: KeyCache) -> None:
        """Quantises the gathered keys and stores them: the rank's cache then holds every token's key."""
        self.lanes.stage("quantise", self._quantise_and_store, k_SD, cache)

    def _quantise_and_store(self, k_SD: torch.Tensor, cache: KeyCache) -> None:
        cache.store(*stages.quantise_k(k_SD))

    def select(self, q_THD: torch.Tensor, shard: Shard, cache: KeyCache) -> torch.Tensor:
        """int32 [T, K]: for each of the rank's rows, the positions of its best keys in its request."""
        q8_THD, q_scale_TH = self.lanes.stage("quantise", stages.quantise_q, q_THD)
        gates_TH = self.lanes.stage(
            "head_gates", stages.head_gates, shard.x_TX, self.weights.weights_proj, q_scale_TH, self.dims.head_dim
        )
        return self.lanes.stage("logits", self._select, q8_THD, gates_TH, shard, cache)

    def _select(self, q8_THD: torch.Tensor, gates_TH: torch.Tensor, shard: Shard, cache: KeyCache) -> torch.Tensor:
        return stages.select(
            q8_THD, cache.values_ND, cache.scale_N, gates_TH, shard.ks_T, shard.ke_T, self.dims.topk, self.logits_mib
        )
