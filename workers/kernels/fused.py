"""The light stages in one pass over q and one over k (`stages: fused`).

Values are rounded to bf16 wherever the separate kernels pass a tensor on, by the same functions, so that both give the same bits.

Shape suffixes: T rows on this rank, H heads, D head dim (128), F rope_dim / 2.
"""
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

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
    quantise_rows_ue8m0,
    rope_rows,
    rounded,
    store_per_row,
    store_rows,
    tiles,
)

if TYPE_CHECKING:
    from experiments.spec.dims import DimsSpec


@triton.jit(do_not_specialize=["num_rows"])
def _q_kernel(
    q_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    rotated_ptr: tl.tensor,
    values_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    num_rows: tl.tensor,
    R: tl.constexpr,
    H: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    WRITE_ROTATED: tl.constexpr,
) -> None:
    row0 = tl.program_id(0) * R
    at, left = row0.to(tl.int64) * 128, num_rows - row0
    cos, sin = load_tables(cos_ptr, sin_ptr, row0, left, R, H, INTERLEAVED)
    cube = rounded(rope_rows(load_rows(q_ptr + at, left, R), cos, sin, INTERLEAVED))
    cube = rounded(hadamard_rows(cube))
    if WRITE_ROTATED:
        store_rows(rotated_ptr + at, cube, left, R)
    values, scale = quantise_rows_ue8m0(cube)
    store_rows(values_ptr + at, values, left, R)
    store_per_row(scale_ptr + row0, scale, left, R)


@triton.jit(do_not_specialize=["num_rows"])
def _k_kernel(
    k_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_rows: tl.tensor,
    R: tl.constexpr,
    INTERLEAVED: tl.constexpr,
) -> None:
    row0 = tl.program_id(0) * R
    at, left = row0.to(tl.int64) * 128, num_rows - row0
    cos, sin = load_tables(cos_ptr, sin_ptr, row0, left, R, 1, INTERLEAVED)
    cube = rounded(layer_norm_rows(load_rows(k_ptr + at, left, R), weight_ptr, bias_ptr))
    cube = rounded(rope_rows(cube, cos, sin, INTERLEAVED))
    store_rows(out_ptr + at, hadamard_rows(cube), left, R)


@operator(
    "q_rope_hadamard_quantise(Tensor q, Tensor cos, Tensor sin, bool interleaved, bool write_rotated) -> (Tensor, Tensor, Tensor)"
)
def _q_rope_hadamard_quantise(
    q_THD: torch.Tensor, cos_TF: torch.Tensor, sin_TF: torch.Tensor, interleaved: bool, write_rotated: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rotated = torch.empty_like(q_THD) if write_rotated else q_THD.new_empty(0)
    values_THD = torch.empty_like(q_THD, dtype=torch.float8_e4m3fn)
    scale_TH = torch.empty(q_THD.shape[:-1], dtype=torch.float32, device=q_THD.device)
    if num_rows := scale_TH.numel():
        _q_kernel[(tiles(num_rows),)](
            q_THD, cos_TF, sin_TF, rotated, values_THD, scale_TH, num_rows,
            TILE_ROWS, q_THD.shape[1], interleaved, write_rotated, num_warps=TILE_WARPS, **EXACT,
        )  # fmt: skip
    return rotated, values_THD, scale_TH


@operator("k_norm_rope_hadamard(Tensor k, Tensor weight, Tensor bias, Tensor cos, Tensor sin, bool interleaved) -> Tensor")
def _k_norm_rope_hadamard(
    k_TD: torch.Tensor,
    weight_D: torch.Tensor,
    bias_D: torch.Tensor,
    cos_TF: torch.Tensor,
    sin_TF: torch.Tensor,
    interleaved: bool,
) -> torch.Tensor:
    out_TD = torch.empty_like(k_TD)
    if num_rows := k_TD.shape[0]:
        _k_kernel[(tiles(num_rows),)](
            k_TD, weight_D, bias_D, cos_TF, sin_TF, out_TD, num_rows, TILE_ROWS, interleaved, num_warps=TILE_WARPS, **EXACT
        )  # fmt: skip
    return out_TD


def q_rope_hadamard_quantise(
    q_THD: torch.Tensor, cos_TF: torch.Tensor, sin_TF: torch.Tensor, dims: DimsSpec, write_rotated: bool = True
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Projected q to what the logits read, in one pass: RoPE, Hadamard transform, quantisation.

    Args:
        q_THD: bf16.
        cos_TF, sin_TF: fp32.
        dims: For the pairing.
        write_rotated: The rotated q is an output of its own, which verification compares; nothing else needs it.

    Returns:
        Rotated q, bf16 [T, H, D] (of no elements unless it is written); e4m3fn [T, H, D]; the scale, fp32 [T, H].
    """
    check_rows(q_THD)
    return _q_rope_hadamard_quantise(q_THD, cos_TF, sin_TF, is_interleaved(dims), write_rotated)


def k_norm_rope_hadamard(
    k_TD: torch.Tensor,
    weight_D: torch.Tensor,
    bias_D: torch.Tensor,
    cos_TF: torch.Tensor,
    sin_TF: torch.Tensor,
    dims: DimsSpec,
) -> torch.Tensor:
    """Projected k, bf16 [T, D], to the rotated keys that are gathered, bf16 [T, D]: LayerNorm, RoPE, Hadamard transform."""
    check_rows(k_TD)
    return _k_norm_rope_hadamard(k_TD, weight_D, bias_D, cos_TF, sin_TF, is_interleaved(dims))
