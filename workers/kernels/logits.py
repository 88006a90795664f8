"""The indexer's logits on Hopper: fp8 matrix instructions with the gated sum over heads behind them, in one kernel.

    out[t, n] = k_scale[n] * sum_h gates[t, h] * relu(q[t, h] . k[n])

A block multiplies 64 keys at a time with 256 rows of q (4 queries of 64 heads, 8 of 32): the keys are the rows of the accumulator and the heads
its columns, so that a thread holds a quarter of a key's heads and sums them with two instructions each. Two warpgroups multiply, each its own 64
keys of a tile and the queries in two halves: while a half is summed, the other half's products, or the other warpgroup's, keep the
matrix units busy. A third warpgroup feeds them by bulk copies: q twice, so that the next queries are there before they are needed, keys some
tiles ahead. Causal: tiles that no query of a block sees are skipped, and all that is left is cut into equal runs of tiles, one for each
thread block, whatever the shape.

Why CUDA C++ and not Triton: Triton's best of seven shapes came within 5 % of this, but as two thread blocks an SM, since the warps of one move in
step and would leave the matrix units idle while they sum. Blocks are placed on empty SMs first, so a grid of two an SM leaves no SM free for a
collective; one block an SM does, exactly as many as it is told to.

Numbers: the matrix unit adds fp8 products to 14 bits (DeepSeek-V3 technical report, section 3.3.2). A logit is exact where every dot product is, as
with small integers; on normal data the largest error seen is 2^-15.5 of k_scale sum_h |gate| sum_d |q||k|. The order of sums is the same for
every row and key, wherever it stands in a tile: equal inputs have equal bits, whatever the split.

Legend: T query rows, N packed keys, H heads, D head dim (128).
"""

from __future__ import annotations

import functools

import torch

from workers.kernels.logits_source import source
from workers.kernels.nvrtc import Kernel, capability, count_sms, row_tiles
from workers.kernels.operators import operator

HEAD_DIM = 128
HEADS = (64, 32)
COLUMNS = 256
"""Rows of q that are multiplied at a time."""
KEYS = 128
"""Of a tile."""
THREADS = 384
Q_STAGES, K_STAGES = 2, 6
DTYPES = (torch.float8_e4m3fn, torch.float8_e4m3fn, torch.float32, torch.float32, torch.int32, torch.int32)
"""Of the inputs, in order."""
PARAMETERS = ("128s", "128s", *"QQQQQ", "q", "i", "i")
"""Of the kernel: two tensor maps, five addresses, a stride, two sizes."""


@functools.cache
def kernel(num_heads: int) -> Kernel:
    """The kernel for a number of heads."""
    defines = f"HEADS={num_heads}", f"Q_STAGES={Q_STAGES}", f"K_STAGES={K_STAGES}"
    shared = Q_STAGES * (COLUMNS * (HEAD_DIM + 4) + 64) + K_STAGES * (KEYS * HEAD_DIM + 16) + 2048
    return Kernel("mqa_logits", source(), defines, THREADS, shared, PARAMETERS)


def mqa_logits(
    q8_THD: torch.Tensor,
    k8_ND: torch.Tensor,
    k_scale_N: torch.Tensor,
    gates_TH: torch.Tensor,
    ks_T: torch.Tensor,
    ke_T: torch.Tensor,
    num_sms: int = 0,
) -> torch.Tensor:
    """fp32 [T, N]: scores of the keys ks <= n < ke of each row. What stands outside is not initialised: nobody may read it.

    Args:
        q8_THD: e4m3fn queries, H 64 or 32, D 128.
        k8_ND: e4m3fn keys.
        k_scale_N: fp32 scales of the keys.
        gates_TH: fp32 gates of the heads.
        ks_T: int32 start of each row's visible keys.
        ke_T: int32 end, exclusive; at most N counts.
        num_sms: How many SMs to use, so that a collective finds the others free; 0 for all.
    """
    out_TN = torch.empty(q8_THD.shape[0], k8_ND.shape[0], dtype=torch.float32, device=q8_THD.device)
    mqa_logits_into(q8_THD, k8_ND, k_scale_N, gates_TH, ks_T, ke_T, out_TN, num_sms)
    return out_TN


@operator(
    "mqa_logits_into(Tensor q8, Tensor k8, Tensor k_scale, Tensor gates, Tensor ks, Tensor ke, Tensor(a!) out, int num_sms) -> ()"
)
def mqa_logits_into(
    q8_THD: torch.Tensor,
    k8_ND: torch.Tensor,
    k_scale_N: torch.Tensor,
    gates_TH: torch.Tensor,
    ks_T: torch.Tensor,
    ke_T: torch.Tensor,
    out_TN: torch.Tensor,
    num_sms: int,
) -> None:
    """As `mqa_logits`, into rows that may be longer than N: the stride of `out_TN` is any."""
    num_rows, num_heads, head_dim = q8_THD.shape
    num_keys = k8_ND.shape[0]
    if num_heads not in HEADS or head_dim != HEAD_DIM or k8_ND.shape[1] != HEAD_DIM:
        raise ValueError(f"{num_heads} heads of {head_dim}: the CUDA kernel has {HEADS} heads of {HEAD_DIM}")
    if capability(q8_THD.device.index) != (9, 0):
        raise ValueError(
            f"{torch.cuda.get_device_name(q8_THD.device)}: the logits kernel is written for Hopper (compute capability 9.0)"
        )
    for x, dtype in zip((q8_THD, k8_ND, k_scale_N, gates_TH, ks_T, ke_T), DTYPES, strict=True):
        if x.dtype != dtype or not x.is_contiguous():
            raise ValueError(f"wants contiguous {dtype}, not {x.dtype} {list(x.shape)} with strides {x.stride()}")
    if out_TN.shape != (num_rows, num_keys) or out_TN.stride(1) != 1 or out_TN.dtype != torch.float32:
        raise ValueError(f"wants fp32 [{num_rows}, {num_keys}] for the logits, not {out_TN.dtype} {list(out_TN.shape)}")
    if not num_rows or not num_keys:
        return
    index = q8_THD.device.index
    kernel(num_heads).launch(
        q8_THD.device,
        min(num_sms or count_sms(index), count_sms(index)),
        row_tiles(q8_THD.data_ptr(), num_rows * num_heads, COLUMNS),
        row_tiles(k8_ND.data_ptr(), num_keys, KEYS),
        gates_TH.data_ptr(),
        k_scale_N.data_ptr(),
        ks_T.data_ptr(),
        ke_T.data_ptr(),
        out_TN.data_ptr(),
        out_TN.stride(0),
        num_rows,
        num_keys,
    )
