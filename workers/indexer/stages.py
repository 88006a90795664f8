"""The stages of the lightning indexer, one function each, with the exact rounding points of DeepSeek-V3.2's prefill.

Sources: SGLang `dsa/dsa_indexer.py`, `dsa/triton_kernel.py`; DeepSeek-V3.2-Exp `inference/model.py`; DeepGEMM's fp8_mqa_logits.
Legend: T rows on this rank, N packed keys (prefix and new tokens of every sequence), H heads, D head dim, K top-k, X hidden,
R q_lora rank.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

FP8_MAX = 448.0
"""Largest finite value of e4m3fn."""
AMAX_FLOOR = 1e-4
"""Keeps the scale of an all-zero vector away from zero."""
NORM_EPS = 1e-6


@functools.cache
def has_bf16_products() -> bool:
    """Whether torch's CPU kernels multiply bf16 matrices at speed. Below AVX-512 they fall back to a loop, 6 to 16 times slower than fp32's (torch
    2.13, Zen 3)."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


def project(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """bf16 [T, in] by bf16 [out, in] to bf16 [T, out], summed in fp32.

    A product of two bf16 is exact in fp32, so where a CPU lacks bf16 kernels, fp32's are the same definition.
    """
    if x.device.type == "cpu" and not has_bf16_products():
        return F.linear(x.float(), weight.float()).to(x.dtype)
    out: torch.Tensor = F.linear(x, weight)
    return out


def norm_k(k_TD: torch.Tensor, weight_D: torch.Tensor, bias_D: torch.Tensor) -> torch.Tensor:
    """LayerNorm in fp32, cast back to bf16."""
    return F.layer_norm(k_TD.float(), k_TD.shape[-1:], weight_D, bias_D, NORM_EPS).to(k_TD.dtype)


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """Hadamard transform over the last dim (Sylvester order, scale D^-0.5), bf16 in and out, fp32 inside.

    The fast transform: log2(D) passes of sums and differences. Each output is the same tree of additions whatever the number of
    rows, so a row's bits do not depend on the split (a matmul's may).
    """
    size = x.shape[-1]
    y = x.float()
    stride = 1
    while stride < size:
        pairs = y.reshape(-1, size // (2 * stride), 2, stride)
        out = torch.empty_like(pairs)
        torch.add(pairs[:, :, 0], pairs[:, :, 1], out=out[:, :, 0])
        torch.sub(pairs[:, :, 0], pairs[:, :, 1], out=out[:, :, 1])
        y = out
        stride *= 2
    return (y.reshape(x.shape) / math.sqrt(size)).to(x.dtype)


def quantise_q(q_THD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3fn [T, H, D] and its scale, fp32 [T, H]: ue8m0, the power of two at or above amax / 448.

    The exponent is taken from the bits (frexp), exact at powers of two.
    """
    x = q_THD.float()
    amax_TH = x.abs().amax(-1).clamp_min(AMAX_FLOOR)
    mantissa, exponent = torch.frexp(amax_TH / FP8_MAX)
    # frexp's mantissa lies in [0.5, 1): 0.5 is exactly a power of two, whose ceiling is itself.
    exponent = exponent - (mantissa == 0.5).to(exponent.dtype)
    scale_TH = torch.ldexp(torch.ones_like(amax_TH), exponent)
    values = (x / scale_TH[..., None]).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return values, scale_TH


def quantise_k(k_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3fn [T, D] and its scale, fp32 [T]: the plain amax / 448, applied as a reciprocal (SGLang's fused store kernel).

    Unlike q's, this scale is not a power of two; every arm uses this rule for k.
    """
    x = k_TD.float()
    scale_T = x.abs().amax(-1).clamp_min(AMAX_FLOOR) / FP8_MAX
    values = (x * (1.0 / scale_T)[..., None]).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return values, scale_T


def head_gates(x_TX: torch.Tensor, weights_proj_HX: torch.Tensor, q_scale_TH: torch.Tensor, head_dim: int) -> torch.Tensor:
    """fp32 [T, H]: the head's weight x H^-0.5 x q's scale x D^-0.5; the projection is bf16 in, fp32 out."""
    gates_TH = x_TX.float() @ weights_proj_HX.float().T
    return gates_TH / math.sqrt(weights_proj_HX.shape[0]) * q_scale_TH / math.sqrt(head_dim)


def mqa_logits(
    q8_THD: torch.Tensor,
    k8_ND: torch.Tensor,
    k_scale_N: torch.Tensor,
    gates_TH: torch.Tensor,
    ks_T: torch.Tensor,
    ke_T: torch.Tensor,
) -> torch.Tensor:
    """fp32 [T, N]: k_scale[n] * sum_h gates[t, h] * relu(q[t, h] . k[n]); -inf outside ks <= n < ke."""
    dots_THN = torch.einsum("thd,nd->thn", q8_THD.float(), k8_ND.float())
    logits_TN = torch.einsum("thn,th->tn", dots_THN.relu_(), gates_TH) * k_scale_N
    n = torch.arange(k8_ND.shape[0], device=k8_ND.device)
    visible_TN = (n >= ks_T[:, None]) & (n < ke_T[:, None])
    return logits_TN.masked_fill_(~visible_TN, float("-inf"))


def topk_positions(logits_TN: torch.Tensor, ks_T: torch.Tensor, ke_T: torch.Tensor, topk: int) -> torch.Tensor:
    """int32 [T, K]: positions in the request of the best visible keys, by score descending, then index ascending; -1 pads.

    A row that sees at most K keys selects all of them. Which of equal scores at the cut get in is torch.topk's choice, and no
    part of the definition.
    """
    count = min(topk, logits_TN.shape[1])
    scores_TK, index_TK = logits_TN.topk(count, dim=1, sorted=False)
    # Two stable sorts put equal scores in index order.
    index_TK, by_index = index_TK.sort(dim=1)
    _, by_score = scores_TK.gather(1, by_index).sort(dim=1, descending=True, stable=True)
    index_TK = index_TK.gather(1, by_score)
    rank_K = torch.arange(count, device=logits_TN.device)
    is_visible_TK = rank_K < (ke_T - ks_T)[:, None]
    out_TK = torch.full((logits_TN.shape[0], topk), -1, dtype=torch.int32, device=logits_TN.device)
    out_TK[:, :count] = torch.where(is_visible_TK, (index_TK - ks_T[:, None]).to(torch.int32), -1)
    return out_TK


@dataclass(frozen=True)
class RowRange:
    """Query rows of one call for logits, and how many packed keys they read: known on the host, so that no stage waits for a device to say so."""

    start: int
    end: int
    num_keys: int


def row_ranges(ke_T: torch.Tensor, num_keys: int, bytes_per_logit: int, logits_mib: int) -> tuple[RowRange, ...]:
    """Chunks of rows whose logits fit in `logits_mib` mebibytes, at least one row each; `ke_T` is on the host.

    A chunk reads keys only up to its last visible one, as the in-seq-split's two calls do.
    """
    num_rows = ke_T.shape[0]
    step = max(1, logits_mib * (1 << 20) // (bytes_per_logit * num_keys))
    bounds = [(start, min(num_rows, start + step)) for start in range(0, num_rows, step)]
    return tuple(RowRange(start, end, int(ke_T[start:end].max())) for start, end in bounds)


def bytes_per_logit(num_heads: int) -> int:
    """What `mqa_logits` holds for one row and key: fp32 products of all heads, and the sums beside them."""
    return 4 * (num_heads + 2)


def select(
    q8_THD: torch.Tensor,
    k8_ND: torch.Tensor,
    k_scale_N: torch.Tensor,
    gates_TH: torch.Tensor,
    ks_T: torch.Tensor,
    ke_T: torch.Tensor,
    topk: int,
    ranges: tuple[RowRange, ...],
) -> torch.Tensor:
    """Logits and top-k, one range of query rows after the other: int32 [T, K], as `topk_positions`."""
    out_TK = torch.full((q8_THD.shape[0], topk), -1, dtype=torch.int32, device=q8_THD.device)
    for r in ranges:
        rows, keys = slice(r.start, r.end), slice(0, r.num_keys)
        logits = mqa_logits(q8_THD[rows], k8_ND[keys], k_scale_N[keys], gates_TH[rows], ks_T[rows], ke_T[rows])
        out_TK[rows] = topk_positions(logits, ks_T[rows], ke_T[rows], topk)
    return out_TK
