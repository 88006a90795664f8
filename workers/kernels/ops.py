"""The stages on a CUDA device as one set: our kernels where the device has them, torch's own elsewhere.

Legend: T rows on this rank, S step tokens, N packed keys, H heads, D head dim, K top-k, X hidden.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from experiments.errors import UserError
from workers.indexer import stages
from workers.indexer.stages import RowRange
from workers.kernels import fused, select, separate
from workers.kernels.deep_gemm import deep_gemm_logits, load_deep_gemm
from workers.kernels.logits import HEADS, mqa_logits
from workers.kernels.nvrtc import count_sms
from workers.kernels.project import project_key
from workers.kernels.tile import HEAD_DIM
from workers.kernels.topk import topk_positions_into

HOPPER = (9, 0)
"""The logits kernel is written for its matrix instructions; other devices run torch's products."""
FP8_SLACK = 2.0**-11
"""Hopper's matrix unit adds fp8 products to 14 bits (DeepSeek-V3 technical report, section 3.3.2): 2^-13 of the largest term each time, and few
terms deep."""


class CudaOps:
    """See `StageOps`."""

    norm_k = staticmethod(separate.norm_k)
    rope = staticmethod(separate.rope)
    rope_one = staticmethod(separate.rope_one)
    hadamard = staticmethod(separate.hadamard)
    quantise_q = staticmethod(separate.quantise_q)
    head_gates = staticmethod(separate.head_gates)
    quantise_k = staticmethod(separate.quantise_k)
    store_keys = staticmethod(separate.store_keys)
    pack_keys = staticmethod(separate.pack_keys)
    store_packed = staticmethod(separate.unpack_keys)
    q_rope_hadamard_quantise = staticmethod(fused.q_rope_hadamard_quantise)
    k_norm_rope_hadamard = staticmethod(fused.k_norm_rope_hadamard)

    def __init__(self, reserved_sms: int, device: torch.device) -> None:
        """`reserved_sms`: what GEMMs and logits leave to others."""
        # Of the whole process, so that all arms run the same library's products: cuBLAS itself ignores the SMs that are to be left.
        torch.backends.cuda.preferred_blas_library("cublaslt")
        self._reserved_sms = reserved_sms
        self._num_sms = count_sms(device.index) - reserved_sms if reserved_sms else 0
        self._has_logits = torch.cuda.get_device_capability(device) == HOPPER
        self.logits_slack = FP8_SLACK

    def project(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """See `stages.project`."""
        # Keys are summed more exactly, by a kernel for Hopper as that of the logits is. It leaves no SMs: who would use them waits for these keys.
        if weight.shape[0] == HEAD_DIM and self._has_logits:
            return project_key(x, weight)
        if not self._reserved_sms:
            out: torch.Tensor = F.linear(x, weight)
            return out
        # A setting of the whole process, read when a product is enqueued.
        torch._C._set_sm_carveout_experimental(self._reserved_sms)
        try:
            out = F.linear(x, weight)
        finally:
            torch._C._set_sm_carveout_experimental(None)
        return out

    def bytes_per_logit(self, num_heads: int) -> int:
        """See `StageOps`."""
        return select.BYTES_PER_LOGIT if self._runs_logits(num_heads) else stages.bytes_per_logit(num_heads)

    def mqa_logits(
        self,
        q8_THD: torch.Tensor,
        k8_ND: torch.Tensor,
        k_scale_N: torch.Tensor,
        gates_TH: torch.Tensor,
        ks_T: torch.Tensor,
        ke_T: torch.Tensor,
    ) -> torch.Tensor:
        """See `stages.mqa_logits`; outside [ks, ke) is anything."""
        if self._runs_logits(q8_THD.shape[1]):
            return mqa_logits(q8_THD, k8_ND, k_scale_N, gates_TH, ks_T, ke_T, self._num_sms)
        return stages.mqa_logits(q8_THD, k8_ND, k_scale_N, gates_TH, ks_T, ke_T)

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
        """See `stages.select`."""
        if self._runs_logits(q8_THD.shape[1]):
            return select.select(q8_THD, k8_ND, k_scale_N, gates_TH, ks_T, ke_T, topk, ranges, self._num_sms)
        return stages.select(q8_THD, k8_ND, k_scale_N, gates_TH, ks_T, ke_T, topk, ranges)

    def _runs_logits(self, num_heads: int) -> bool:
        return self._has_logits and num_heads in HEADS


class DeepGemmOps(CudaOps):
    """See `StageOps`: all stages ours but the logits; the top-k too, whose order is canonical."""

    def __init__(self, reserved_sms: int, device: torch.device) -> None:
        """
        Raises:
            UserError: The package does not load, or the GPU is another than its logits were checked on.
        """
        super().__init__(reserved_sms, device)
        capability = torch.cuda.get_device_capability(device)
        if capability != HOPPER:
            raise UserError(
                f"arms.*.logits deepgemm: checked on Hopper (compute capability 9.0), and {torch.cuda.get_device_name(device)} has "
                f"{capability[0]}.{capability[1]}: use logits cplab"
            )
        load_deep_gemm()
        self._sms = count_sms(device.index) - reserved_sms

    def bytes_per_logit(self, num_heads: int) -> int:
        """See `StageOps`."""
        return select.BYTES_PER_LOGIT

    def mqa_logits(
        self,
        q8_THD: torch.Tensor,
        k8_ND: torch.Tensor,
        k_scale_N: torch.Tensor,
        gates_TH: torch.Tensor,
        ks_T: torch.Tensor,
        ke_T: torch.Tensor,
    ) -> torch.Tensor:
        """See `stages.mqa_logits`."""
        return deep_gemm_logits(q8_THD, k8_ND, k_scale_N, gates_TH, ks_T, ke_T, self._sms, True)

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
        """See `stages.select`."""
        out_TK = select.empty_positions(q8_THD.shape[0], topk, ranges, q8_THD.device)
        for r in ranges:
            rows, keys = slice(r.start, r.end), slice(0, r.num_keys)
            logits = deep_gemm_logits(
                q8_THD[rows], k8_ND[keys], k_scale_N[keys], gates_TH[rows], ks_T[rows], ke_T[rows], self._sms, False
            )
            topk_positions_into(logits, ks_T[rows], ke_T[rows], out_TK[rows], self._num_sms)
        return out_TK
