"""A tile of rows of 128 values, and what the light stages do to it, for the kernels of `separate` and `fused`.

In memory a row is [4, 4, 8]: two high bits, two middle bits and three low bits of the dimension. A tile of R rows is loaded as [4, R, 4, 8] with R
eight times the number of warps: then a thread holds four pieces of 16 bytes of one row, four threads share a row, and a warp's access covers whole
sectors. Inside the kernel the tile is a hypercube, [2, 2, R, 2, 2, 2, 2, 2] in fp32, one axis for each bit of the dimension (`axis of bit b` is
7 - b for b < 5, else 6 - b), so that "the value at the dimension with bit b flipped" is a register of the same thread for five bits and
one warp shuffle for the two middle ones. Only rotary tables and scales pass through shared memory.

Every rounding is the one that `workers.indexer.stages` has on a CPU: kernels that use these functions are compiled without contraction of a product
and a sum into one rounding, divisions are correctly rounded, and sums follow a stated tree, whatever the layout the compiler chooses.

Names: R rows of a tile, `left` rows that remain from the tile's first on, `cube` a hypercube, H heads.
"""
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from experiments.spec.dims import DimsSpec

HEAD_DIM = 128
ROPE_DIM = 64
TILE_ROWS, TILE_WARPS = 8, 1
"""Small thread blocks: of eight shapes tried on an H100 none was faster for any stage, from 512 x 64 rows to 16384 x 64."""

EXACT = {"enable_fp_fusion": False}
"""How kernels are compiled: a product keeps its own rounding, as in the reference."""

_FP8_MAX = tl.constexpr(448.0)
_AMAX_FLOOR = tl.constexpr(1e-4)
_NORM_EPS = tl.constexpr(1e-6)
_SQRT_DIM = tl.constexpr(11.313708305358887)
"""128^0.5 in fp32."""
_RSQRT_DIM = tl.constexpr(0.08838834613561630)
"""1 / _SQRT_DIM in fp32, correctly rounded."""


def tiles(num_rows: int) -> int:
    """Thread blocks for so many rows."""
    return -(-num_rows // TILE_ROWS)


def check_rows(*tensors: torch.Tensor) -> None:
    """Raises ValueError unless every tensor is contiguous bf16 [..., 128]."""
    for x in tensors:
        if x.dtype != torch.bfloat16 or x.shape[-1] != HEAD_DIM or not x.is_contiguous():
            raise ValueError(f"wants contiguous bf16 [..., {HEAD_DIM}], not {x.dtype} {list(x.shape)} with strides {x.stride()}")


def is_interleaved(dims: DimsSpec) -> bool:
    """Raises ValueError for a rope_dim that the kernels do not have."""
    if dims.rope_dim != ROPE_DIM:
        raise ValueError(f"rope_dim {dims.rope_dim}: the CUDA kernels rotate the first {ROPE_DIM} of {HEAD_DIM} dims only")
    return dims.rope_style == "interleaved"


@triton.jit
def _dims_of_tile() -> tl.tensor:
    high = tl.arange(0, 4)[:, None, None, None]
    middle = tl.arange(0, 4)[None, None, :, None]
    low = tl.arange(0, 8)[None, None, None, :]
    return high * 32 + middle * 8 + low


@triton.jit
def load_rows(row0_ptr: tl.tensor, left: tl.tensor, R: tl.constexpr) -> tl.tensor:
    """The tile of bf16 rows from `row0_ptr` on, as a cube in fp32; rows past `left` are zero."""
    r = tl.arange(0, R)[None, :, None, None]
    tile = tl.load(row0_ptr + r * 128 + _dims_of_tile(), mask=r < left, other=0.0)
    return tl.reshape(tile.to(tl.float32), [2, 2, R, 2, 2, 2, 2, 2])


@triton.jit
def store_rows(row0_ptr: tl.tensor, cube: tl.tensor, left: tl.tensor, R: tl.constexpr) -> None:
    """Writes a cube as rows of the pointer's element type (bf16 or e4m3fn), rounded to nearest even."""
    r = tl.arange(0, R)[None, :, None, None]
    tile = tl.reshape(cube.to(row0_ptr.dtype.element_ty), [4, R, 4, 8])
    tl.store(row0_ptr + r * 128 + _dims_of_tile(), tile, mask=r < left)


@triton.jit
def _is_high(AXIS: tl.constexpr) -> tl.tensor:
    """int32 0 and 1 along an axis of the cube."""
    return tl.reshape(tl.arange(0, 2), [1] * AXIS + [2] + [1] * (7 - AXIS))


@triton.jit
def _across(cube: tl.tensor, AXIS: tl.constexpr) -> tl.tensor:
    """For every value the one on the other side of the axis."""
    bits = cube.to(tl.int32, bitcast=True)
    return (bits ^ tl.xor_sum(bits, AXIS, keep_dims=True)).to(tl.float32, bitcast=True)


@triton.jit
def _negated_where(cube: tl.tensor, is_negated: tl.tensor) -> tl.tensor:
    return (cube.to(tl.int32, bitcast=True) ^ (is_negated << 31)).to(tl.float32, bitcast=True)


@triton.jit
def _butterfly(cube: tl.tensor, AXIS: tl.constexpr) -> tl.tensor:
    """a + b and a - b."""
    return _across(cube, AXIS) + _negated_where(cube, _is_high(AXIS))


@triton.jit
def rounded(cube: tl.tensor) -> tl.tensor:
    """To bf16, and back to fp32 for what follows: where the separate stages pass a tensor on."""
    return cube.to(tl.bfloat16).to(tl.float32)


@triton.jit
def hadamard_rows(cube: tl.tensor) -> tl.tensor:
    """Butterflies over strides 1, 2, ... 64 in this order, then a division by sqrt(128); not yet rounded to bf16."""
    for bit in tl.static_range(7):
        cube = _butterfly(cube, 7 - bit if bit < 5 else 6 - bit)
    # The correctly rounded quotient in three operations: one Newton step from the rounded reciprocal leaves a remainder that is exact
    # (Markstein, 1990). The remainder is taken with its sign turned, so that a zero keeps its own.
    quotient = cube * _RSQRT_DIM
    remainder = tl.fma(quotient, _SQRT_DIM, -cube)
    return tl.fma(remainder, -_RSQRT_DIM, quotient)


@triton.jit
def _eight(first: tl.tensor, second: tl.tensor, R: tl.constexpr) -> tl.tensor:
    """Two [1, R, 4, 4] side by side."""
    return tl.reshape(tl.permute(tl.join(first, second), (0, 1, 2, 4, 3)), [1, 1, R, 2, 2, 2, 2, 2])


@triton.jit
def load_tables(
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    row0: tl.tensor,
    left: tl.tensor,
    R: tl.constexpr,
    H: tl.constexpr,
    INTERLEAVED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """cos and sin of a tile's rows, H of which share a token, as cubes (some axes of size 1)."""
    r = tl.arange(0, R)[None, :, None, None]
    token = (row0 + r) // H
    middle = tl.arange(0, 4)[None, None, :, None]
    e = tl.arange(0, 4)[None, None, None, :]
    if INTERLEAVED:
        # Dims 2f and 2f + 1 turn by frequency f: the cube's last bit does not count.
        f = token * 32 + tl.arange(0, 2)[:, None, None, None] * 16 + middle * 4 + e
        cos = tl.reshape(tl.load(cos_ptr + f, mask=r < left, other=0.0), [1, 2, R, 2, 2, 2, 2, 1])
        sin = tl.reshape(tl.load(sin_ptr + f, mask=r < left, other=0.0), [1, 2, R, 2, 2, 2, 2, 1])
    else:
        # Dims f and f + 32 turn by frequency f: the bit of 32 does not count. Two loads of four, as a thread holds eight values.
        f = token * 32 + middle * 8 + e
        cos = _eight(tl.load(cos_ptr + f, mask=r < left, other=0.0), tl.load(cos_ptr + f + 4, mask=r < left, other=0.0), R)
        sin = _eight(tl.load(sin_ptr + f, mask=r < left, other=0.0), tl.load(sin_ptr + f + 4, mask=r < left, other=0.0), R)
    return cos, sin


@triton.jit
def rope_rows(cube: tl.tensor, cos: tl.tensor, sin: tl.tensor, INTERLEAVED: tl.constexpr) -> tl.tensor:
    """Turns the pairs of the first 64 dims; not yet rounded to bf16 (the other dims are exact anyway)."""
    AXIS: tl.constexpr = 7 if INTERLEAVED else 1
    # First of a pair: a cos - b sin; second: b cos + a sin.
    turned = cube * cos + _negated_where(_across(cube, AXIS), 1 - _is_high(AXIS)) * sin
    return tl.where(_is_high(0) == 0, turned, cube)


@triton.jit
def amax_rows(cube: tl.tensor) -> tl.tensor:
    """max |x| of each row, [1, 1, R, 1, 1, 1, 1, 1], kept away from zero. Axes within a thread first."""
    amax = tl.max(tl.max(tl.max(tl.abs(cube), 7, keep_dims=True), 6, keep_dims=True), 5, keep_dims=True)
    amax = tl.max(tl.max(amax, 1, keep_dims=True), 0, keep_dims=True)
    amax = tl.max(tl.max(amax, 4, keep_dims=True), 3, keep_dims=True)
    return tl.maximum(amax, _AMAX_FLOOR)


@triton.jit
def quantise_rows_ue8m0(cube: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Values for e4m3fn and the scale of each row: the power of two at or above amax / 448, its exponent taken from the bits.

    |x| / scale is at most 448, and the conversion saturates: no clamp.
    """
    bits = tl.div_rn(amax_rows(cube), _FP8_MAX).to(tl.int32, bitcast=True)
    exponent = (bits + 0x7FFFFF) >> 23
    # A division by a power of two is the product with its inverse.
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    return cube * inverse, (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def quantise_rows_plain(cube: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Values for e4m3fn and the scale of each row: amax / 448, applied as its reciprocal. The conversion saturates: no clamp."""
    scale = tl.div_rn(amax_rows(cube), _FP8_MAX)
    return cube * tl.div_rn(1.0, scale), scale


@triton.jit
def _sum_rows(cube: tl.tensor) -> tl.tensor:
    """Sum of each row, by halves: the same tree for every layout."""
    for bit in tl.static_range(7):
        cube = tl.sum(cube, 7 - bit if bit < 5 else 6 - bit, keep_dims=True)
    return cube


@triton.jit
def layer_norm_rows(cube: tl.tensor, weight_ptr: tl.tensor, bias_ptr: tl.tensor) -> tl.tensor:
    """LayerNorm over the row in fp32 (biased variance, of centred values); not yet rounded to bf16."""
    weight = tl.reshape(tl.load(weight_ptr + _dims_of_tile()).to(tl.float32), [2, 2, 1, 2, 2, 2, 2, 2])
    bias = tl.reshape(tl.load(bias_ptr + _dims_of_tile()).to(tl.float32), [2, 2, 1, 2, 2, 2, 2, 2])
    centred = cube - _sum_rows(cube) * 0.0078125
    deviation = tl.sqrt_rn(_sum_rows(centred * centred) * 0.0078125 + _NORM_EPS)
    return centred * tl.div_rn(1.0, deviation) * weight + bias


@triton.jit
def store_per_row(row0_ptr: tl.tensor, value: tl.tensor, left: tl.tensor, R: tl.constexpr) -> None:
    """Writes one number a row."""
    r = tl.arange(0, R)
    tl.store(row0_ptr + r, tl.reshape(value, [R]), mask=r < left)
