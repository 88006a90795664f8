"""The light stages, one kernel each, as SGLang runs DeepSeek-V3.2's indexer unfused.

Each gives the bits of `workers.indexer.stages` on a CPU, except `norm_k` (its mean and variance are summed in another order: within one bf16
step) and `head_gates` (a matrix product). All are deterministic.

Shape suffixes: T rows on this rank, S step tokens, N packed keys, H heads, D head dim (128), F rope_dim / 2, X hidden.
"""
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from workers.kernels.operators import operator
from workers.kernels.tile import (
    EXACT,
    TILE_ROWS,
    TILE_WARPS,
    check_rows,
    hadamard_rows,
    is_interleaved,
    layer_norm_rows,
    load_rows,
    load_tables,
    quantise_rows_plain,
    quantise_rows_ue8m0,
    rope_rows,
    store_per_row,
    store_rows,
    tiles,
)

if TYPE_CHECKING:
    from experiments.spec.dims import DimsSpec


@triton.jit
def _rope_tile(
    x_ptr: tl.tensor,
    out_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    row0: tl.tensor,
    num_rows: tl.tensor,
    R: tl.constexpr,
    H: tl.constexpr,
    INTERLEAVED: tl.constexpr,
) -> None:
    at, left = row0.to(tl.int64) * 128, num_rows - row0
    cos, sin = load_tables(cos_ptr, sin_ptr, row0, left, R, H, INTERLEAVED)
    store_rows(out_ptr + at, rope_rows(load_rows(x_ptr + at, left, R), cos, sin, INTERLEAVED), left, R)


@triton.jit(do_not_specialize=["num_x_rows", "num_k_rows", "x_tiles"])
def _rope_kernel(
    x_ptr: tl.tensor,
    k_ptr: tl.tensor,
    x_out_ptr: tl.tensor,
    k_out_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    num_x_rows: tl.tensor,
    num_k_rows: tl.tensor,
    x_tiles: tl.tensor,
    R: tl.constexpr,
    H: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_K: tl.constexpr,
) -> None:
    tile = tl.program_id(0)
    if HAS_K:
        if tile < x_tiles:
            _rope_tile(x_ptr, x_out_ptr, cos_ptr, sin_ptr, tile * R, num_x_rows, R, H, INTERLEAVED)
        else:
            _rope_tile(k_ptr, k_out_ptr, cos_ptr, sin_ptr, (tile - x_tiles) * R, num_k_rows, R, 1, INTERLEAVED)
    else:
        _rope_tile(x_ptr, x_out_ptr, cos_ptr, sin_ptr, tile * R, num_x_rows, R, H, INTERLEAVED)


@triton.jit(do_not_specialize=["num_rows"])
def _hadamard_kernel(x_ptr: tl.tensor, out_ptr: tl.tensor, num_rows: tl.tensor, R: tl.constexpr) -> None:
    row0 = tl.program_id(0) * R
    at, left = row0.to(tl.int64) * 128, num_rows - row0
    store_rows(out_ptr + at, hadamard_rows(load_rows(x_ptr + at, left, R)), left, R)


@triton.jit(do_not_specialize=["num_rows"])
def _norm_kernel(
    x_ptr: tl.tensor, weight_ptr: tl.tensor, bias_ptr: tl.tensor, out_ptr: tl.tensor, num_rows: tl.tensor, R: tl.constexpr
) -> None:
    row0 = tl.program_id(0) * R
    at, left = row0.to(tl.int64) * 128, num_rows - row0
    store_rows(out_ptr + at, layer_norm_rows(load_rows(x_ptr + at, left, R), weight_ptr, bias_ptr), left, R)


@triton.jit(do_not_specialize=["num_rows"])
def _quantise_kernel(
    x_ptr: tl.tensor, values_ptr: tl.tensor, scale_ptr: tl.tensor, num_rows: tl.tensor, R: tl.constexpr, UE8M0: tl.constexpr
) -> None:
    row0 = tl.program_id(0) * R
    at, left = row0.to(tl.int64) * 128, num_rows - row0
    cube = load_rows(x_ptr + at, left, R)
    if UE8M0:
        values, scale = quantise_rows_ue8m0(cube)
    else:
        values, scale = quantise_rows_plain(cube)
    store_rows(values_ptr + at, values, left, R)
    store_per_row(scale_ptr + row0, scale, left, R)


@triton.jit(do_not_specialize=["num_rows"])
def _store_kernel(
    k_ptr: tl.tensor, values_ptr: tl.tensor, scale_ptr: tl.tensor, rows_ptr: tl.tensor, num_rows: tl.tensor, R: tl.constexpr
) -> None:
    row0 = tl.program_id(0) * R
    left = num_rows - row0
    values, scale = quantise_rows_plain(load_rows(k_ptr + row0.to(tl.int64) * 128, left, R))
    r = tl.arange(0, R)
    r4 = r[None, :, None, None]
    to4 = tl.load(rows_ptr + row0 + r4, mask=r4 < left, other=0).to(tl.int64)
    dims = (
        tl.arange(0, 4)[:, None, None, None] * 32
        + tl.arange(0, 4)[None, None, :, None] * 8
        + tl.arange(0, 8)[None, None, None, :]
    )
    tile = tl.reshape(values.to(values_ptr.dtype.element_ty), [4, R, 4, 8])
    tl.store(values_ptr + to4 * 128 + dims, tile, mask=r4 < left)
    to = tl.load(rows_ptr + row0 + r, mask=r < left, other=0)
    tl.store(scale_ptr + to, tl.reshape(scale, [R]), mask=r < left)


@triton.jit(do_not_specialize=["num_rows"])
def _pack_kernel(k_ptr: tl.tensor, packed_ptr: tl.tensor, num_rows: tl.tensor, R: tl.constexpr) -> None:
    """A packed row is 33 words: 32 of values and the scale's."""
    row0 = tl.program_id(0) * R
    left = num_rows - row0
    values, scale = quantise_rows_plain(load_rows(k_ptr + row0.to(tl.int64) * 128, left, R))
    r = tl.arange(0, R)
    r4 = r[None, :, None, None]
    dims = (
        tl.arange(0, 4)[:, None, None, None] * 32
        + tl.arange(0, 4)[None, None, :, None] * 8
        + tl.arange(0, 8)[None, None, None, :]
    )
    first = packed_ptr + row0.to(tl.int64) * 132
    tile = tl.reshape(values.to(tl.float8e4nv), [4, R, 4, 8])
    tl.store((first + r4 * 132 + dims).to(tl.pointer_type(tl.float8e4nv)), tile, mask=r4 < left)
    tl.store((first + r * 132 + 128).to(tl.pointer_type(tl.float32)), tl.reshape(scale, [R]), mask=r < left)


@triton.jit(do_not_specialize=["num_rows"])
def _unpack_kernel(
    packed_ptr: tl.tensor, values_ptr: tl.tensor, scale_ptr: tl.tensor, rows_ptr: tl.tensor, num_rows: tl.tensor, R: tl.constexpr
) -> None:
    r = tl.program_id(0) * R + tl.arange(0, R)
    is_row = r < num_rows
    to = tl.load(rows_ptr + r, mask=is_row, other=0).to(tl.int64)
    word = tl.arange(0, 32)
    words_ptr = packed_ptr.to(tl.pointer_type(tl.int32))
    at = r.to(tl.int64)[:, None] * 33
    words = tl.load(words_ptr + at + word[None, :], mask=is_row[:, None])
    tl.store(values_ptr.to(tl.pointer_type(tl.int32)) + to[:, None] * 32 + word[None, :], words, mask=is_row[:, None])
    scale = tl.load(words_ptr + r.to(tl.int64) * 33 + 32, mask=is_row)
    tl.store(scale_ptr.to(tl.pointer_type(tl.int32)) + to, scale, mask=is_row)


@triton.jit(do_not_specialize=["count"])
def _scale_gates_kernel(
    gates_ptr: tl.tensor,
    q_scale_ptr: tl.tensor,
    count: tl.tensor,
    SQRT_HEADS: tl.constexpr,
    SQRT_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    gates = tl.div_rn(tl.load(gates_ptr + at, mask=at < count, other=0.0), SQRT_HEADS)
    gates = tl.div_rn(gates * tl.load(q_scale_ptr + at, mask=at < count, other=0.0), SQRT_DIM)
    tl.store(gates_ptr + at, gates, mask=at < count)


def _rows(x: torch.Tensor) -> int:
    return x.numel() // x.shape[-1]


def _heads(x: torch.Tensor) -> int:
    return x.shape[1] if x.dim() == 3 else 1


@operator("rope(Tensor q, Tensor k, Tensor cos, Tensor sin, bool interleaved) -> (Tensor, Tensor)")
def _rope(
    q_THD: torch.Tensor, k_TD: torch.Tensor, cos_TF: torch.Tensor, sin_TF: torch.Tensor, interleaved: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    q_out_THD, k_out_TD = torch.empty_like(q_THD), torch.empty_like(k_TD)
    if num_rows := _rows(q_THD):
        q_tiles = tiles(num_rows)
        _rope_kernel[(q_tiles + tiles(k_TD.shape[0]),)](
            q_THD, k_TD, q_out_THD, k_out_TD, cos_TF, sin_TF, num_rows, k_TD.shape[0], q_tiles,
            TILE_ROWS, _heads(q_THD), interleaved, True, num_warps=TILE_WARPS, **EXACT,
        )  # fmt: skip
    return q_out_THD, k_out_TD


@operator("rope_one(Tensor x, Tensor cos, Tensor sin, bool interleaved) -> Tensor")
def _rope_one(x: torch.Tensor, cos_TF: torch.Tensor, sin_TF: torch.Tensor, interleaved: bool) -> torch.Tensor:
    out = torch.empty_like(x)
    if num_rows := _rows(x):
        _rope_kernel[(tiles(num_rows),)](
            x, x, out, out, cos_TF, sin_TF, num_rows, 0, tiles(num_rows),
            TILE_ROWS, _heads(x), interleaved, False, num_warps=TILE_WARPS, **EXACT,
        )  # fmt: skip
    return out


@operator("hadamard(Tensor x) -> Tensor")
def _hadamard(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    if num_rows := _rows(x):
        _hadamard_kernel[(tiles(num_rows),)](x, out, num_rows, TILE_ROWS, num_warps=TILE_WARPS, **EXACT)
    return out


@operator("norm_k(Tensor k, Tensor weight, Tensor bias) -> Tensor")
def _norm_k(k_TD: torch.Tensor, weight_D: torch.Tensor, bias_D: torch.Tensor) -> torch.Tensor:
    out_TD = torch.empty_like(k_TD)
    if num_rows := _rows(k_TD):
        _norm_kernel[(tiles(num_rows),)](k_TD, weight_D, bias_D, out_TD, num_rows, TILE_ROWS, num_warps=TILE_WARPS, **EXACT)
    return out_TD


@operator("quantise(Tensor x, bool ue8m0) -> (Tensor, Tensor)")
def _quantise(x: torch.Tensor, ue8m0: bool) -> tuple[torch.Tensor, torch.Tensor]:
    values = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    scale = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if num_rows := _rows(x):
        _quantise_kernel[(tiles(num_rows),)](x, values, scale, num_rows, TILE_ROWS, ue8m0, num_warps=TILE_WARPS, **EXACT)
    return values, scale


@operator("store_keys(Tensor k, Tensor(a!) values, Tensor(b!) scale, Tensor rows) -> ()")
def _store_keys(k_SD: torch.Tensor, values_ND: torch.Tensor, scale_N: torch.Tensor, rows_S: torch.Tensor) -> None:
    if num_rows := _rows(k_SD):
        _store_kernel[(tiles(num_rows),)](k_SD, values_ND, scale_N, rows_S, num_rows, TILE_ROWS, num_warps=TILE_WARPS, **EXACT)


@operator("pack_keys(Tensor k) -> Tensor")
def _pack_keys(k_TD: torch.Tensor) -> torch.Tensor:
    packed = torch.empty(k_TD.shape[0], 132, dtype=torch.uint8, device=k_TD.device)
    if num_rows := _rows(k_TD):
        _pack_kernel[(tiles(num_rows),)](k_TD, packed, num_rows, TILE_ROWS, num_warps=TILE_WARPS, **EXACT)
    return packed


@operator("unpack_keys(Tensor packed, Tensor(a!) values, Tensor(b!) scale, Tensor rows) -> ()")
def _unpack_keys(packed_SB: torch.Tensor, values_ND: torch.Tensor, scale_N: torch.Tensor, rows_S: torch.Tensor) -> None:
    if num_rows := packed_SB.shape[0]:
        _unpack_kernel[(-(-num_rows // 64),)](packed_SB, values_ND, scale_N, rows_S, num_rows, 64, num_warps=4)


@operator("scale_gates(Tensor(a!) gates, Tensor q_scale, int head_dim) -> ()")
def _scale_gates(gates_TH: torch.Tensor, q_scale_TH: torch.Tensor, head_dim: int) -> None:
    if count := gates_TH.numel():
        roots = math.sqrt(gates_TH.shape[1]), math.sqrt(head_dim)
        _scale_gates_kernel[(-(-count // 1024),)](gates_TH, q_scale_TH, count, *roots, 1024, num_warps=4, **EXACT)


def rope(
    q_THD: torch.Tensor, k_TD: torch.Tensor, cos_TF: torch.Tensor, sin_TF: torch.Tensor, dims: DimsSpec
) -> tuple[torch.Tensor, torch.Tensor]:
    """q, bf16 [T, H, D], and k, bf16 [T, D], with their first 64 dims turned by fp32 tables: new tensors, one launch for both."""
    check_rows(q_THD, k_TD)
    return _rope(q_THD, k_TD, cos_TF, sin_TF, is_interleaved(dims))


def rope_one(x: torch.Tensor, cos_TF: torch.Tensor, sin_TF: torch.Tensor, dims: DimsSpec) -> torch.Tensor:
    """`rope` for bf16 [T, H, D] or [T, D] alone."""
    check_rows(x)
    return _rope_one(x, cos_TF, sin_TF, is_interleaved(dims))


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """Hadamard transform of the last dim, bf16 [..., D] to bf16: `stages.hadamard`, with the same tree of sums."""
    check_rows(x)
    return _hadamard(x)


def norm_k(k_TD: torch.Tensor, weight_D: torch.Tensor, bias_D: torch.Tensor) -> torch.Tensor:
    """LayerNorm of bf16 [T, D] in fp32, back to bf16; weight and bias fp32 or bf16."""
    check_rows(k_TD)
    return _norm_k(k_TD, weight_D, bias_D)


def quantise_q(q_THD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3fn [T, H, D] and its scale, fp32 [T, H], a power of two: `stages.quantise_q`."""
    check_rows(q_THD)
    return _quantise(q_THD, True)


def quantise_k(k_SD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3fn [S, D] and its scale, fp32 [S]: `stages.quantise_k`."""
    check_rows(k_SD)
    return _quantise(k_SD, False)


def store_keys(k_SD: torch.Tensor, values_ND: torch.Tensor, scale_N: torch.Tensor, rows_S: torch.Tensor) -> None:
    """Quantises bf16 keys as `quantise_k` and writes each to its row of the cache, in one kernel.

    Args:
        k_SD: bf16.
        values_ND: e4m3fn, written at `rows_S`.
        scale_N: fp32, written at `rows_S`.
        rows_S: int64 or int32, each row at most once.
    """
    check_rows(k_SD)
    _store_keys(k_SD, values_ND, scale_N, rows_S)


def pack_keys(k_TD: torch.Tensor) -> torch.Tensor:
    """Quantises bf16 keys as `quantise_k`, into uint8 [T, 132]: 128 values and an fp32 scale a row, in one kernel."""
    check_rows(k_TD)
    return _pack_keys(k_TD)


def unpack_keys(packed_SB: torch.Tensor, values_ND: torch.Tensor, scale_N: torch.Tensor, rows_S: torch.Tensor) -> None:
    """Writes packed keys, uint8 [S, 132], to their rows of the cache: e4m3fn [N, D] and fp32 [N] at `rows_S`, int64 or int32."""
    if packed_SB.dtype != torch.uint8 or packed_SB.shape[1:] != (132,) or not packed_SB.is_contiguous():
        raise ValueError(f"packed keys are contiguous uint8 [S, 132], not {packed_SB.dtype} {list(packed_SB.shape)}")
    _unpack_keys(packed_SB, values_ND, scale_N, rows_S)


def head_gates(x_TX: torch.Tensor, weights_proj_HX: torch.Tensor, q_scale_TH: torch.Tensor, head_dim: int) -> torch.Tensor:
    """fp32 [T, H]: a matrix product of bf16 with fp32 output, then x H^-0.5 x q's scale x D^-0.5 in a small kernel."""
    gates_TH: torch.Tensor = torch.mm(x_TX, weights_proj_HX.T, out_dtype=torch.float32)
    _scale_gates(gates_TH, q_scale_TH, head_dim)
    return gates_TH
