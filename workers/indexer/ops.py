"""Stage sets: the same stages as kernels of a device. An indexer calls them through this; the torch ones are right everywhere.

Legend: T rows on this rank, S step tokens, N packed keys, H heads, D head dim, K top-k, X hidden, F rope_dim / 2.
"""

from __future__ import annotations

from typing import Protocol

import torch

from experiments.spec.dims import DimsSpec
from workers.indexer import stages
from workers.indexer.gates import LOGITS_SLACK
from workers.indexer.rope import apply_rope
from workers.indexer.stages import RowRange


class StageOps(Protocol):
    """See `workers.indexer.stages` for what each returns."""

    logits_slack: float
    """Of logits against R2, as a share of the magnitudes that they are sums of: see `gates.LOGITS_SLACK`."""

    def project(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor: ...

    def norm_k(self, k_TD: torch.Tensor, weight_D: torch.Tensor, bias_D: torch.Tensor) -> torch.Tensor: ...

    def rope(
        self, q_THD: torch.Tensor, k_TD: torch.Tensor, cos_TF: torch.Tensor, sin_TF: torch.Tensor, dims: DimsSpec
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """q and k in one call."""
        ...

    def rope_one(self, x: torch.Tensor, cos_TF: torch.Tensor, sin_TF: torch.Tensor, dims: DimsSpec) -> torch.Tensor:
        """q or k alone, to the same bits."""
        ...

    def hadamard(self, x: torch.Tensor) -> torch.Tensor: ...

    def quantise_q(self, q_THD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...

    def quantise_k(self, k_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...

    def store_keys(self, k_SD: torch.Tensor, values_ND: torch.Tensor, scale_N: torch.Tensor, rows_S: torch.Tensor) -> None:
        """Quantises keys into those rows of a cache."""
        ...

    def pack_keys(self, k_TD: torch.Tensor) -> torch.Tensor:
        """Keys quantised for the wire: bf16 [T, D] to uint8 [T, 132], 128 values and an fp32 scale."""
        ...

    def store_packed(self, packed_SB: torch.Tensor, values_ND: torch.Tensor, scale_N: torch.Tensor, rows_S: torch.Tensor) -> None:
        """Writes packed keys, uint8 [S, 132], into those rows of a cache."""
        ...

    def head_gates(
        self, x_TX: torch.Tensor, weights_proj_HX: torch.Tensor, q_scale_TH: torch.Tensor, head_dim: int
    ) -> torch.Tensor: ...

    def mqa_logits(
        self,
        q8_THD: torch.Tensor,
        k8_ND: torch.Tensor,
        k_scale_N: torch.Tensor,
        gates_TH: torch.Tensor,
        ks_T: torch.Tensor,
        ke_T: torch.Tensor,
    ) -> torch.Tensor: ...

    def bytes_per_logit(self, num_heads: int) -> int:
        """What `select` holds for one row and key."""
        ...

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
        """int32 [T, K]; logits of one range of rows at a time."""
        ...


class TorchOps:
    """See `StageOps`: the stages as they are written."""

    logits_slack = LOGITS_SLACK

    project = staticmethod(stages.project)
    norm_k = staticmethod(stages.norm_k)
    rope_one = staticmethod(apply_rope)
    hadamard = staticmethod(stages.hadamard)
    quantise_q = staticmethod(stages.quantise_q)
    quantise_k = staticmethod(stages.quantise_k)
    head_gates = staticmethod(stages.head_gates)
    mqa_logits = staticmethod(stages.mqa_logits)
    select = staticmethod(stages.select)
    bytes_per_logit = staticmethod(stages.bytes_per_logit)

    def rope(
        self, q_THD: torch.Tensor, k_TD: torch.Tensor, cos_TF: torch.Tensor, sin_TF: torch.Tensor, dims: DimsSpec
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return apply_rope(q_THD, cos_TF, sin_TF, dims), apply_rope(k_TD, cos_TF, sin_TF, dims)

    def store_keys(self, k_SD: torch.Tensor, values_ND: torch.Tensor, scale_N: torch.Tensor, rows_S: torch.Tensor) -> None:
        values_SD, scale_S = stages.quantise_k(k_SD)
        # Bytes are copied: indexed writes know no fp8.
        values_ND.view(torch.uint8)[rows_S] = values_SD.view(torch.uint8)
        scale_N[rows_S] = scale_S

    def pack_keys(self, k_TD: torch.Tensor) -> torch.Tensor:
        values_TD, scale_T = stages.quantise_k(k_TD)
        return torch.cat([values_TD.view(torch.uint8), scale_T[:, None].view(torch.uint8)], 1)

    def store_packed(self, packed_SB: torch.Tensor, values_ND: torch.Tensor, scale_N: torch.Tensor, rows_S: torch.Tensor) -> None:
        head_dim = values_ND.shape[1]
        values_ND.view(torch.uint8)[rows_S] = packed_SB[:, :head_dim]
        scale_N[rows_S] = packed_SB[:, head_dim:].contiguous().view(torch.float32)[:, 0]
