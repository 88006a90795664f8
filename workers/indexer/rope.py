"""Rotary position embedding with YaRN's frequency correction, in the two pairings that DSA models use.

Sources: Su et al. 2021 (RoPE); Peng et al. 2023, section 3.2 (YaRN); DeepSeek-V3.2's indexer pairs NeoX-style (SGLang #13439),
GLM-5's interleaved. YaRN's attention factor is 1 for both models (mscale equals mscale_all_dim).
Legend: T rows, F rope_dim / 2 frequencies.
"""

from __future__ import annotations

import math

import torch

from experiments.spec.dims import DimsSpec


def inverse_frequencies(dims: DimsSpec) -> torch.Tensor:
    """fp32 [F], radians a token; computed in float64 and rounded once.

    At position 1e5 the last bit of a frequency turns a pair by 0.009 rad, which moves a selection: tables that take their powers in
    fp32, as upstream's do, differ there from machine to machine.
    """
    half = dims.rope_dim // 2
    inv_F = 1.0 / dims.rope_theta ** (torch.arange(half, dtype=torch.float64) / half)
    yarn = dims.yarn
    if yarn is None:
        return inv_F.float()

    def dim_with_rotations(rotations: float) -> float:
        wavelengths = yarn.original_positions / (rotations * 2 * math.pi)
        return dims.rope_dim * math.log(wavelengths) / (2 * math.log(dims.rope_theta))

    low = max(math.floor(dim_with_rotations(yarn.beta_fast)), 0)
    high = min(math.ceil(dim_with_rotations(yarn.beta_slow)), dims.rope_dim - 1)
    ramp_F = ((torch.arange(half, dtype=torch.float64) - low) / max(high - low, 0.001)).clamp(0, 1)
    # Fast dims keep their frequency, slow ones are interpolated to the longer context.
    return (inv_F * (1 - ramp_F) + inv_F / yarn.factor * ramp_F).float()


class RotaryTable:
    """cos and sin at any position, computed in fp32."""

    def __init__(self, dims: DimsSpec, device: torch.device | None = None) -> None:
        self.dims = dims
        self.inv_F = inverse_frequencies(dims).to(device)

    def cos_sin(self, positions_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """fp32 [T, F] each, for int64 positions [T]."""
        angles_TF = positions_T.to(torch.float32)[:, None] * self.inv_F
        return angles_TF.cos(), angles_TF.sin()


def apply_rope(x: torch.Tensor, cos_TF: torch.Tensor, sin_TF: torch.Tensor, dims: DimsSpec) -> torch.Tensor:
    """Rotates the first rope_dim of bf16 [T, ..., D] by fp32 tables; the rest passes through."""
    shape = (x.shape[0],) + (1,) * (x.dim() - 2) + (cos_TF.shape[1],)
    cos, sin = cos_TF.view(shape), sin_TF.view(shape)
    out = x.clone()
    half = dims.rope_dim // 2
    if dims.rope_style == "neox":
        first, second = slice(0, half), slice(half, dims.rope_dim)
    else:
        first, second = slice(0, dims.rope_dim, 2), slice(1, dims.rope_dim, 2)
    a, b = x[..., first].float(), x[..., second].float()
    out[..., first] = (a * cos - b * sin).to(x.dtype)
    out[..., second] = (a * sin + b * cos).to(x.dtype)
    return out
