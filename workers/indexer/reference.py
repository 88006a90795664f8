"""The lightning indexer written straight from its definition, slow and in float64, to judge the real stages by.

Two references share this text. R1 (`rounding=False`) is the definition without any rounding: it is reported, it gates nothing.
R2 (`rounding=True`) is float64 arithmetic with bf16 / fp8 / fp32 rounding at exactly the points where the data flow of
DeepSeek-V3.2 rounds: `gates` compares the real stages with it. Nothing here is shared with the stages that are judged.

    q_lora -> wq_b | bf16 ----------------------> RoPE | bf16 -> Hadamard | bf16 -> fp8, scale 2^n
    x      -> wk   | bf16 -> LayerNorm | bf16 --> RoPE | bf16 -> Hadamard | bf16 -> fp8, fp32 scale
    x      -> weights_proj | fp32 -> x H^-0.5 x q_scale x D^-0.5 | fp32        -> logits | fp32 -> top-k

Every tensor that comes out is float64 on the CPU, holding values of the format named; any dtype and device may go in.

Shape suffixes: T rows (queries), S tokens of a step, N packed keys (prefix and new tokens of every sequence), H heads,
D head dim, K top-k, X hidden, R q_lora rank. `dots` stands for any leading axes.

Sources: DeepSeek-V3.2-Exp `inference/model.py` and `kernel.py` (data flow, ue8m0 rule, YaRN); SGLang `dsa_indexer.py` (neox style,
plain fp32 scale of the keys, packed ranges).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from experiments.spec.dims import DimsSpec
from experiments.workload.step import Step

FP8_MAX = 448.0
"""The largest finite e4m3fn value."""
AMAX_FLOOR = 1e-4
"""The least magnitude a scale is made for, so that a row of zeros has one."""
LAYER_NORM_EPS = 1e-6
_CHUNK_ELEMENTS = 2**24
"""Dot products of one chunk of `logits`: 128 MiB of float64."""


class IndexerWeightsLike(Protocol):
    """Anything that holds one layer's weights, laid out as `torch.nn.Linear` does (outputs first)."""

    @property
    def wq_b(self) -> Tensor:
        """bf16 [H*D, R]."""

    @property
    def wk(self) -> Tensor:
        """bf16 [D, X]."""

    @property
    def k_norm_weight(self) -> Tensor:
        """fp32 [D]."""

    @property
    def k_norm_bias(self) -> Tensor:
        """fp32 [D]."""

    @property
    def weights_proj(self) -> Tensor:
        """bf16 [H, X]."""


@dataclass(frozen=True)
class ReferenceWeights:
    """The plainest `IndexerWeightsLike`."""

    wq_b: Tensor
    wk: Tensor
    k_norm_weight: Tensor
    k_norm_bias: Tensor
    weights_proj: Tensor


def as_float64(x: Tensor) -> Tensor:
    """`x` as float64 on the CPU; exact from every format of the data flow."""
    return x.detach().to("cpu", torch.float64)


def _pow2(exponent: Tensor) -> Tensor:
    """2^exponent in float64 from its bits: exact whatever the maths library does. Exponents of normal numbers only."""
    return ((exponent.to(torch.int64) + 1023) << 52).view(torch.float64)


def bf16_ulp(x: Tensor) -> Tensor:
    """The distance between bf16 neighbours at the magnitude of float64 `x` (8 significant bits; 2^-133 below 2^-126)."""
    exponent = torch.frexp(x).exponent
    return _pow2(exponent.clamp(-125, 128) - 8)


def fp8_step(x: Tensor) -> Tensor:
    """The distance between e4m3fn neighbours at the magnitude of float64 `x` (4 significant bits; 2^-9 below 2^-6)."""
    exponent = torch.frexp(x).exponent
    return _pow2(exponent.clamp(-5, 9) - 4)


def round_bf16(x: Tensor) -> Tensor:
    """Float64 `x` to the nearest bf16, ties to even. Once: a cast by way of fp32 would round twice."""
    ulp = bf16_ulp(x)
    return torch.round(x / ulp) * ulp


def round_fp32(x: Tensor) -> Tensor:
    """Float64 `x` to the nearest fp32, ties to even."""
    return x.to(torch.float32).to(torch.float64)


def round_fp8(x: Tensor) -> Tensor:
    """Float64 `x` holding fp32 values, clamped to +-448 and rounded to the nearest e4m3fn, ties to even."""
    return x.clamp(-FP8_MAX, FP8_MAX).to(torch.float32).to(torch.float8_e4m3fn).to(torch.float64)


def ue8m0_scale(amax: Tensor) -> Tensor:
    """2^ceil(log2(max(amax, 1e-4) / 448)), exact at powers of two because the exponent is read, not computed by a logarithm."""
    mantissa, exponent = torch.frexp(amax.clamp(min=AMAX_FLOOR) / FP8_MAX)
    return _pow2(torch.where(mantissa == 0.5, exponent - 1, exponent))


def inverse_frequencies(dims: DimsSpec) -> Tensor:
    """Radians per position of each rotated pair, float64 [rope_dim / 2].

    With YaRN, DeepSeek's blend: pairs that turn more than beta_fast times within the original context keep their frequency, those
    below beta_slow turns are slowed by `factor`, with a linear ramp between. YaRN's attention factor (mscale) does not appear:
    DeepSeek-V3.2 sets mscale equal to mscale_all_dim, so it is 1.
    """
    half = dims.rope_dim // 2
    pair = torch.arange(half, dtype=torch.float64)
    frequency = dims.rope_theta ** (-2.0 * pair / dims.rope_dim)
    if dims.yarn is None:
        return frequency
    yarn = dims.yarn

    def pair_that_turns(rotations: float) -> float:
        turns = yarn.original_positions / (rotations * 2 * math.pi)
        return dims.rope_dim * math.log(turns) / (2 * math.log(dims.rope_theta))

    low = min(max(math.floor(pair_that_turns(yarn.beta_fast)), 0), dims.rope_dim - 1)
    high = min(max(math.ceil(pair_that_turns(yarn.beta_slow)), 0), dims.rope_dim - 1)
    ramp = ((pair - low) / max(high - low, 0.001)).clamp(0, 1)
    return frequency / yarn.factor * ramp + frequency * (1 - ramp)


def hadamard_matrix(size: int) -> Tensor:
    """Sylvester's matrix of +-1, float64 [size, size]: entry (i, j) is -1 to the number of bits that i and j share.

    Raises:
        ValueError: `size` is no power of two.
    """
    if size < 1 or size & (size - 1):
        raise ValueError(f"a Sylvester Hadamard matrix has a power of two of rows, not {size}")
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
    return matrix


class Reference:
    """One layer's indexer, every stage callable alone on the inputs that a real stage was given.

    `unrounded=True` gives a stage's result before its last rounding, which is what a gate measures distances from.

    Args:
        dims: Shapes and position encoding.
        weights: The layer's weights; read once, as float64.
        rounding: False for R1, True for R2.

    Raises:
        ValueError: A weight does not have the shape that `dims` asks for.
    """

    def __init__(self, dims: DimsSpec, weights: IndexerWeightsLike, rounding: bool) -> None:
        self.dims = dims
        self.rounding = rounding
        heads, dim, hidden = dims.num_heads, dims.head_dim, dims.hidden
        self.wq_b = _weight("wq_b", weights.wq_b, (heads * dim, dims.q_lora_rank))
        self.wk = _weight("wk", weights.wk, (dim, hidden))
        self.k_norm_weight_D = _weight("k_norm_weight", weights.k_norm_weight, (dim,))
        self.k_norm_bias_D = _weight("k_norm_bias", weights.k_norm_bias, (dim,))
        self.weights_proj = _weight("weights_proj", weights.weights_proj, (heads, hidden))
        self._hadamard_DD = hadamard_matrix(dim)
        self._frequencies = inverse_frequencies(dims)

    def _bf16(self, x: Tensor, unrounded: bool) -> Tensor:
        return round_bf16(x) if self.rounding and not unrounded else x

    def _fp32(self, x: Tensor, unrounded: bool = False) -> Tensor:
        return round_fp32(x) if self.rounding and not unrounded else x

    def project_q(self, q_lora_TR: Tensor, *, unrounded: bool = False) -> Tensor:
        """Query heads [T, H, D], bf16 values."""
        flat = as_float64(q_lora_TR) @ self.wq_b.T
        return self._bf16(flat.view(-1, self.dims.num_heads, self.dims.head_dim), unrounded)

    def project_k(self, x_TX: Tensor, *, unrounded: bool = False) -> Tensor:
        """The one key head [T, D], bf16 values, before its LayerNorm."""
        return self._bf16(as_float64(x_TX) @ self.wk.T, unrounded)

    def norm_k(self, k_TD: Tensor, *, unrounded: bool = False) -> Tensor:
        """LayerNorm of the projected key over D (biased variance, eps 1e-6, affine), [T, D], bf16 values."""
        k = as_float64(k_TD)
        centred = k - k.mean(-1, keepdim=True)
        deviation = (centred.square().mean(-1, keepdim=True) + LAYER_NORM_EPS).sqrt()
        return self._bf16(centred / deviation * self.k_norm_weight_D + self.k_norm_bias_D, unrounded)

    def angles(self, positions_T: Tensor) -> Tensor:
        """Radians by which each pair turns, [T, rope_dim / 2].

        R2 rounds frequencies and angles to fp32 as the real tables do. That error is real: at position 1e5 an angle of 75,000 rad is
        known to +-0.004 rad only, and a table whose frequencies differ in the last fp32 bit turns by up to 0.009 rad more.
        """
        positions = as_float64(positions_T)
        return self._fp32(positions[:, None] * self._fp32(self._frequencies))

    def rope(self, x: Tensor, positions_T: Tensor, *, unrounded: bool = False) -> Tensor:
        """`x` [T, D] or [T, H, D] with its first rope_dim dims rotated by `positions_T` (global positions); the rest untouched.

        Raises:
            ValueError: Rows and positions differ in number, or `x` has another number of axes.
        """
        x64 = as_float64(x)
        if x64.dim() not in (2, 3) or positions_T.shape != x64.shape[:1]:
            raise ValueError(f"rope wants [T, D] or [T, H, D] and T positions, not {list(x.shape)} and {list(positions_T.shape)}")
        angle = self.angles(positions_T)
        cos, sin = self._fp32(angle.cos()), self._fp32(angle.sin())
        if x64.dim() == 3:
            cos, sin = cos[:, None], sin[:, None]
        first, second = rope_pairs(self.dims)
        a, b = x64[..., first], x64[..., second]
        out = x64.clone()
        out[..., first] = a * cos - b * sin
        out[..., second] = b * cos + a * sin
        return self._bf16(out, unrounded)

    def hadamard(self, x_dotsD: Tensor, *, unrounded: bool = False) -> Tensor:
        """The orthonormal Hadamard transform of the last axis (Sylvester order, scale D^-0.5), bf16 values."""
        return self._bf16(as_float64(x_dotsD) @ self._hadamard_DD * self.dims.head_dim**-0.5, unrounded)

    def quantise_q(self, q_THD: Tensor) -> tuple[Tensor, Tensor]:
        """Rotated queries to (e4m3fn values [T, H, D], scale [T, H]); the scale is a power of two (ue8m0).

        R1 does not quantise: the values come back as they are, with scale 1.
        """
        q = as_float64(q_THD)
        if not self.rounding:
            return q, torch.ones(q.shape[:-1], dtype=torch.float64)
        scale = ue8m0_scale(q.abs().amax(-1))
        return round_fp8(q / scale[..., None]), scale

    def quantise_k(self, k_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Rotated keys to (e4m3fn values [N, D], scale [N]); the scale is a plain fp32 number.

        The rule is fp32 arithmetic: s = max(1e-4, amax) / 448, then values times the rounded reciprocal 1 / s. Each step below is
        one float64 operation rounded to fp32, which equals the IEEE fp32 operation. R1 does not quantise: scale 1.
        """
        k = as_float64(k_ND)
        if not self.rounding:
            return k, torch.ones(k.shape[:-1], dtype=torch.float64)
        floor = torch.tensor(AMAX_FLOOR, dtype=torch.float32).item()
        scale = round_fp32(k.abs().amax(-1).clamp(min=floor) / FP8_MAX)
        reciprocal = round_fp32(1.0 / scale)
        return round_fp8(round_fp32(k * reciprocal[:, None])), scale

    def head_gates(self, x_TX: Tensor, q_scale_TH: Tensor, *, unrounded: bool = False) -> Tensor:
        """Weight of each head's score, fp32 values [T, H]: (x @ weights_proj^T) H^-0.5 q_scale D^-0.5."""
        projected = self._fp32(as_float64(x_TX) @ self.weights_proj.T, unrounded)
        scaled = projected * as_float64(q_scale_TH) * self.dims.num_heads**-0.5 * self.dims.head_dim**-0.5
        return self._fp32(scaled, unrounded)

    def logits(
        self,
        q_values_THD: Tensor,
        k_values_ND: Tensor,
        k_scale_N: Tensor,
        gates_TH: Tensor,
        *,
        rows_per_chunk: int | None = None,
        unrounded: bool = False,
    ) -> Tensor:
        """L[t, n] = k_scale[n] sum_h gates[t, h] relu(q[t, h] . k[n]), fp32 values [T, N], over ALL n: the caller masks.

        Args:
            q_values_THD: Quantised queries, without their scale (the gates carry it).
            k_values_ND: Quantised keys, without their scale.
            k_scale_N: Scale of each key.
            gates_TH: From `head_gates`.
            rows_per_chunk: Rows evaluated at once, to bound memory (8 H N bytes each); by default about 128 MiB of them.
            unrounded: Leave out the rounding to fp32.
        """
        q, k, gates = as_float64(q_values_THD), as_float64(k_values_ND), as_float64(gates_TH)
        rows, heads, dim = q.shape
        keys = k.shape[0]
        chunk = rows_per_chunk or max(1, _CHUNK_ELEMENTS // max(1, heads * keys))
        out = torch.empty(rows, keys, dtype=torch.float64)
        for at in range(0, rows, chunk):
            dots = (q[at : at + chunk].reshape(-1, dim) @ k.T).relu_().view(-1, heads, keys)
            out[at : at + chunk] = torch.bmm(gates[at : at + chunk, None, :], dots)[:, 0]
        return self._fp32(out * as_float64(k_scale_N), unrounded)

    def keys(self, x_SX: Tensor, positions_S: Tensor) -> Tensor:
        """Hidden states to rotated keys [S, D], bf16 values: what the gather moves."""
        return self.hadamard(self.rope(self.norm_k(self.project_k(x_SX)), positions_S))

    def queries(self, q_lora_TR: Tensor, positions_T: Tensor) -> Tensor:
        """Latent queries to rotated queries [T, H, D], bf16 values."""
        return self.hadamard(self.rope(self.project_q(q_lora_TR), positions_T))

    def scores(
        self, q_lora_TR: Tensor, x_TX: Tensor, positions_T: Tensor, keys_ND: Tensor, *, rows_per_chunk: int | None = None
    ) -> Tensor:
        """The whole indexer for some rows: fp32 logits [T, N] over the packed rotated keys `keys_ND`, unmasked."""
        q_values, q_scale = self.quantise_q(self.queries(q_lora_TR, positions_T))
        k_values, k_scale = self.quantise_k(keys_ND)
        gates = self.head_gates(x_TX, q_scale)
        return self.logits(q_values, k_values, k_scale, gates, rows_per_chunk=rows_per_chunk)


def _weight(name: str, weight: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(weight.shape) != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(weight.shape)}")
    return as_float64(weight)


def rope_pairs(dims: DimsSpec) -> tuple[Tensor, Tensor]:
    """Indexes of the first and the second member of each rotated pair, int64 [rope_dim / 2] each."""
    half = dims.rope_dim // 2
    pair = torch.arange(half)
    if dims.rope_style == "neox":
        return pair, pair + half
    return 2 * pair, 2 * pair + 1


def packed_ranges(step: Step) -> list[tuple[int, int, int]]:
    """(ks, ke, position) of every new token of the step, in token order.

    The keys of all sequences stand one after the other, each contributing its prefix and its new tokens. A token sees the keys
    ks <= n < ke of its own sequence up to and including itself; `position` is its place in the sequence.
    """
    ranges: list[tuple[int, int, int]] = []
    start = 0
    for sequence in step.sequences:
        for new in range(sequence.new_tokens):
            position = sequence.prefix_tokens + new
            ranges.append((start, start + position + 1, position))
        start += sequence.prefix_tokens + sequence.new_tokens
    return ranges


def topk_rows(scores_TN: Tensor, ks_T: Tensor, ke_T: Tensor, topk: int) -> Tensor:
    """The `topk` best keys of each row, int64 [T, K]: indexes relative to ks, padded with -1 at the end.

    Canonical order: score descending, then index ascending. A row with at most `topk` visible keys gives all of them.

    Raises:
        ValueError: A visible score is not finite.
    """
    out = torch.full((scores_TN.shape[0], topk), -1, dtype=torch.int64)
    for row, (ks, ke) in enumerate(zip(ks_T.tolist(), ke_T.tolist(), strict=True)):
        visible = as_float64(scores_TN[row, ks:ke])
        if not bool(visible.isfinite().all()):
            raise ValueError(f"row {row}: a score in [{ks}, {ke}) is not finite")
        best = torch.sort(visible, descending=True, stable=True).indices[:topk]
        out[row, : best.numel()] = best
    return out
