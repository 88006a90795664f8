"""Is a stage right? What the real stages produced, compared with R2 on the stage's own inputs, and the whole through top-k.

Every bound is a distance from the UNROUNDED result on the same inputs: what one rounding to the output's format may add, and a
slack for arithmetic in fp32. So a stage passes for what it does, not for what the stage before it did, and a wrong formula fails.
The slacks were calibrated with float32 re-implementations; `tests/workers/test_gates.py` holds those and the mutants, and
`tests/workers/test_recall.py` the bounds of top-k.

A result's `worst` and `bound` belong to one element: the one whose error is the largest share of what it is allowed.

Shape suffixes: T rows, N packed keys, H heads, D head dim, K top-k, X hidden, R q_lora rank, O outputs of a projection.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.indexer.reference import FP8_MAX, Reference, as_float64, bf16_ulp, fp8_step, rope_pairs, topk_rows

ACCUMULATION_SLACK = 2.0**-20
"""fp32 accumulation of a projection, as a share of sum |x||w|: 16 units of roundoff. One accumulator that walks 7168 random terms
one by one erred by 2^-22.2, in blocks of 16 by 2^-23.9, fp16 accumulation by 2^-10.7. It is for terms of mixed sign: where all terms
agree in sign, 7168 of them one by one err by 2^-17.5."""

ELEMENTWISE_ULPS = 1.0
"""bf16 units in the last place for a stage that maps a row to a row: half is the rounding of the result, the other half lets a
kernel hold a constant (D^-0.5) in bf16."""

ELEMENTWISE_SLACK = 2.0**-20
"""fp32 arithmetic inside such a stage, as a share of the magnitudes that are added."""

ANGLE_SLACK = 2.0**-21
"""Rotation angles, as a share of the angle: 4 fp32 units for the frequency (power, reciprocal, YaRN's blend) and the product. At
position 1e5 the fastest blended pair may so be 0.036 rad off, and a shift by one position (up to 1 rad) still shows."""

K_VALUES_SHARE = 2.0**-7
"""Share of fp8 key values that may differ by one step. Seen: 0.0005 with a divide for the reciprocal, 0.002 with a scale one fp32
unit off, 0.003 with a reciprocal one unit off; nothing with the stated rule."""

LOGITS_SLACK = 2.0**-21
"""fp32 dots of 128 and sums over heads, as a share of k_scale sum_h |w| sum_d |q||k|; float32 kernels erred by 2^-25.8 here, and
other hardware sums in other orders. Tensor cores that accumulate fp8 products in fewer bits need a wider one: pass it, and say so in
the record."""

FLIP_SHARE = 2.0**-4
"""fp8 entries that differ by one step where EVERY bf16 entry before them differs by one unit: 2^-7 of a value against a step of
2^-3. Two correct implementations differ in far fewer, so this is the worst case of one bf16 flip, not an estimate."""

GAP_DEVIATIONS = 4.0
"""Standard deviations, under FLIP_SHARE, that a swapped key may lie from the k-th score. A swap is the deviation of two scores, and one
score was seen 2.8 off: the largest of 11 million (`mini`, 4K to 16K keys, float32 re-implementations). Swaps themselves lay within
0.6; within 1.4 (DeepSeek-V3.2's shapes, 8K keys) with rotary tables of float32 powers. A k scale that is left out swaps across 27."""

MIN_RECALL = 0.999
"""Least share of R2's top-k that is found, over the rows of a call that see more than K keys. Float32 re-implementations found 0.99927
or more in every one of 29 cases of 64 rows (`mini`, 4K to 16K keys; the mean is 0.9998) and 0.9999 with DeepSeek-V3.2's shapes;
4K keys with a k scale in bf16 find 0.996, bf16 logits 0.995, keys with two bits of mantissa 0.935 (128 rows). Tables of float32 powers are another
definition from about 4K keys on: 0.998 there, 0.994 at 16K (`mini`). Where those are right, pass a lower one and say so in the record."""

SPARE_SWAPS = 3
"""Swaps that MIN_RECALL does not count: of a hundred indexes one swap is a whole per cent. Their gaps are judged all the same."""


@dataclass(frozen=True)
class GateResult:
    """One gate's verdict; `detail` names the worst element and both values."""

    stage: str
    ok: bool
    worst: float
    """Error of the worst element, in units of the stage's output."""
    bound: float
    """The error that element was allowed."""
    detail: str


@dataclass(frozen=True)
class TopkResult:
    """Top-k against R2's scores. A swap is an index that one of both selected and the other did not, at another score than the k-th: of keys
    that tie with it, whichever get in are right. With few heads many do: where no head is active, a key scores 0."""

    ok: bool
    recall: float
    """1 - swaps over the indexes selected by R2, of all rows that see more than K keys: the others have no choice. 1 where there is no such
    row, as `detail` then says."""
    worst_swap_gap: float
    """Distance of the worst swapped element from the row's k-th score, in units of the score."""
    gap_bound: float
    """The distance it was allowed."""
    swaps: int
    """Indexes that got in, or of R2's were left out, whichever are more."""
    detail: str


def _compare(stage: str, axes: Sequence[str], got: Tensor, exact: Tensor, shown: Tensor, bound: Tensor) -> GateResult:
    """Element by element |got - exact| <= bound; a value that is not finite is infinitely wrong."""
    got64 = as_float64(got)
    if got64.shape != exact.shape:
        raise ValueError(f"{stage}: got shape {list(got64.shape)}, the reference has {list(exact.shape)}")
    if got64.numel() == 0:
        return GateResult(stage, True, 0.0, 0.0, "nothing to compare")
    error = (got64 - exact).abs().nan_to_num(nan=math.inf, posinf=math.inf)
    bound = bound.expand_as(error)
    share = torch.where(error == 0, torch.zeros_like(error), error / bound)
    at = int(share.argmax())
    place = torch.unravel_index(torch.tensor(at), error.shape)
    where = ", ".join(f"{axis} {int(index)}" for axis, index in zip(axes, place, strict=True))
    detail = f"{where}: got {float(got64.flatten()[at])!r}, R2 says {float(shown.flatten()[at])!r}"
    return GateResult(stage, bool((error <= bound).all()), float(error.flatten()[at]), float(bound.flatten()[at]), detail)


def _gemm_bound(exact: Tensor, x: Tensor, weight_OX: Tensor) -> Tensor:
    """Half a bf16 unit of the furthest value that fp32 accumulation may reach, and the accumulation itself."""
    slack = (as_float64(x).abs() @ weight_OX.abs().T).view_as(exact) * ACCUMULATION_SLACK
    return bf16_ulp(exact.abs() + slack) / 2 + slack


def gate_project_q(r2: Reference, q_lora_TR: Tensor, got_THD: Tensor) -> GateResult:
    """Projected query heads: a bf16 projection accumulated in fp32."""
    exact = r2.project_q(q_lora_TR, unrounded=True)
    bound = _gemm_bound(exact, q_lora_TR, r2.wq_b)
    return _compare("project_q", ("row", "head", "dim"), got_THD, exact, r2.project_q(q_lora_TR), bound)


def gate_project_k(r2: Reference, x_TX: Tensor, got_TD: Tensor) -> GateResult:
    """The projected key head, before its norm: a bf16 projection accumulated in fp32."""
    exact = r2.project_k(x_TX, unrounded=True)
    return _compare("project_k", ("row", "dim"), got_TD, exact, r2.project_k(x_TX), _gemm_bound(exact, x_TX, r2.wk))


def gate_norm_k(r2: Reference, k_TD: Tensor, got_TD: Tensor) -> GateResult:
    """LayerNorm of the key. The slack is for a variance taken of centred values, not for E[k^2] - E[k]^2."""
    exact = r2.norm_k(k_TD, unrounded=True)
    k = as_float64(k_TD)
    rstd = (k.var(-1, correction=0, keepdim=True) + 1e-6).rsqrt()
    magnitude = k.abs().amax(-1, keepdim=True) * rstd * r2.k_norm_weight_D.abs() + r2.k_norm_bias_D.abs()
    bound = ELEMENTWISE_ULPS * bf16_ulp(exact) + ELEMENTWISE_SLACK * magnitude
    return _compare("norm_k", ("row", "dim"), got_TD, exact, r2.norm_k(k_TD), bound)


def gate_rope(r2: Reference, stage: str, x: Tensor, positions_T: Tensor, got: Tensor) -> GateResult:
    """RoPE of queries [T, H, D] or keys [T, D]; dims past rope_dim have to come through unchanged.

    Args:
        r2: The reference.
        stage: The name to report under ("rope_q", "rope_k").
        x: What went in.
        positions_T: Global positions of the rows.
        got: What came out.
    """
    exact = r2.rope(x, positions_T, unrounded=True)
    x64 = as_float64(x)
    first, second = rope_pairs(r2.dims)
    length = torch.hypot(x64[..., first], x64[..., second])
    angle = r2.angles(positions_T)
    turn = (ANGLE_SLACK * angle.abs() + ELEMENTWISE_SLACK).view(-1, *[1] * (x64.dim() - 2), angle.shape[1])
    bound = torch.zeros_like(exact)
    for member in (first, second):
        bound[..., member] = ELEMENTWISE_ULPS * bf16_ulp(exact[..., member]) + turn * length
    axes = ("row", "dim") if x64.dim() == 2 else ("row", "head", "dim")
    return _compare(stage, axes, got, exact, r2.rope(x, positions_T), bound)


def gate_hadamard(r2: Reference, stage: str, x: Tensor, got: Tensor) -> GateResult:
    """The Hadamard rotation of queries [T, H, D] or keys [T, D], reported under the name `stage`."""
    exact = r2.hadamard(x, unrounded=True)
    magnitude = as_float64(x).abs().sum(-1, keepdim=True) * r2.dims.head_dim**-0.5
    bound = ELEMENTWISE_ULPS * bf16_ulp(exact) + ELEMENTWISE_SLACK * magnitude
    axes = ("row", "dim") if exact.dim() == 2 else ("row", "head", "dim")
    return _compare(stage, axes, got, exact, r2.hadamard(x), bound)


def gate_quantise_q(r2: Reference, q_THD: Tensor, got_values_THD: Tensor, got_scale_TH: Tensor) -> list[GateResult]:
    """Scales, then values, of quantised queries ([T, H] or [T, H, 1] scales).

    A scale equals R2's bit for bit, or is its double where the row's magnitude is 448 x 2^n exactly (a rounded logarithm may go
    there). Values are exact given the scale: bf16 over a power of two is exact in fp32, and one rounding to fp8 leaves no choice.
    """
    values, scale = r2.quantise_q(q_THD)
    got_scale = as_float64(got_scale_TH).reshape(scale.shape)
    q = as_float64(q_THD)
    at_boundary = scale * FP8_MAX == q.abs().amax(-1)
    bound = torch.where(at_boundary & (got_scale == 2 * scale), scale, torch.zeros_like(scale))
    scales = _compare("quantise_q.scale", ("row", "head"), got_scale, scale, scale, bound)
    doubled = at_boundary & (got_scale == 2 * scale)
    expected = torch.where(doubled[..., None], _requantised(q, 2 * scale), values)
    return [scales, _compare("quantise_q.values", ("row", "head", "dim"), got_values_THD, expected, expected, torch.zeros(()))]


def _requantised(q_THD: Tensor, scale_TH: Tensor) -> Tensor:
    scaled = (q_THD / scale_TH[..., None]).clamp(-FP8_MAX, FP8_MAX)
    return scaled.to(torch.float32).to(torch.float8_e4m3fn).to(torch.float64)


def gate_quantise_k(
    r2: Reference, k_ND: Tensor, got_values_ND: Tensor, got_scale_N: Tensor, share: float = K_VALUES_SHARE
) -> list[GateResult]:
    """Scales (one fp32 unit), values (one fp8 step), and the share of values that differ at all, of quantised keys."""
    values, scale = r2.quantise_k(k_ND)
    got_scale = as_float64(got_scale_N).reshape(scale.shape)
    exponent = torch.frexp(scale).exponent
    ulp = torch.exp2((exponent - 24).to(torch.float64))
    got_values = as_float64(got_values_ND)
    results = [
        _compare("quantise_k.scale", ("key",), got_scale, scale, scale, ulp),
        _compare("quantise_k.values", ("key", "dim"), got_values, values, values, fp8_step(values)),
    ]
    differing = float((got_values != values).to(torch.float64).mean()) if values.numel() else 0.0
    count = int((got_values != values).sum())
    text = f"{count} of {values.numel()} values differ from R2's"
    return [*results, GateResult("quantise_k.differing", differing <= share, differing, share, text)]


def gate_head_gates(r2: Reference, x_TX: Tensor, q_scale_TH: Tensor, got_TH: Tensor) -> GateResult:
    """Head gates: a projection accumulated in fp32, and four fp32 roundings."""
    exact = r2.head_gates(x_TX, q_scale_TH, unrounded=True)
    magnitude = as_float64(x_TX).abs() @ r2.weights_proj.abs().T
    factor = as_float64(q_scale_TH) * (r2.dims.num_heads * r2.dims.head_dim) ** -0.5
    bound = ACCUMULATION_SLACK * magnitude * factor + 4 * 2.0**-24 * exact.abs()
    return _compare("head_gates", ("row", "head"), got_TH, exact, r2.head_gates(x_TX, q_scale_TH), bound)


def gate_logits(
    r2: Reference,
    q_values_THD: Tensor,
    k_values_ND: Tensor,
    k_scale_N: Tensor,
    gates_TH: Tensor,
    ks_T: Tensor,
    ke_T: Tensor,
    got_TN: Tensor,
    slack: float = LOGITS_SLACK,
) -> GateResult:
    """Logits inside [ks, ke) of each row; what stands outside is anyone's.

    Cancellation makes a score small beside its terms, so the slack scales with the terms: k_scale sum_h |w| sum_d |q||k|.
    """
    exact = r2.logits(q_values_THD, k_values_ND, k_scale_N, gates_TH, unrounded=True)
    term_TD = torch.einsum("th,thd->td", as_float64(gates_TH).abs(), as_float64(q_values_THD).abs())
    magnitude = (term_TD @ as_float64(k_values_ND).abs().T) * as_float64(k_scale_N)
    visible = _visible(ks_T, ke_T, exact.shape[1])
    got = torch.where(visible, as_float64(got_TN), exact)
    shown = exact.to(torch.float32).to(torch.float64)
    return _compare("logits", ("row", "key"), got, exact, shown, slack * magnitude)


def _visible(ks_T: Tensor, ke_T: Tensor, keys: int) -> Tensor:
    column = torch.arange(keys)
    return (column >= ks_T.cpu()[:, None]) & (column < ke_T.cpu()[:, None])


def check_topk_structure(got_TK: Tensor, lengths_T: Tensor, topk: int) -> GateResult:
    """The form of every top-k row, without any score: cheap enough for ALL rows.

    min(length, topk) indexes, each in [0, length), none twice, -1 in every place after them. `worst` counts rows that break a rule.

    Args:
        got_TK: Indexes relative to ks, any integer dtype.
        lengths_T: Visible keys of each row, ke - ks; 0 for a padding row, which has to be all -1.
        topk: K.

    Raises:
        ValueError: `got_TK` is not [T, topk].
    """
    got = got_TK.detach().to(torch.int64)  # where it is: there may be many rows
    lengths = lengths_T.detach().to(got.device, torch.int64)
    if got.shape != (lengths.numel(), topk):
        raise ValueError(f"topk: got shape {list(got.shape)}, expected {[lengths.numel(), topk]}")
    wanted = lengths.clamp(max=topk)
    in_place = torch.arange(topk, device=got.device) < wanted[:, None]
    ordered = got.sort(-1).values
    broken = {
        "the number of indexes": (got >= 0).sum(-1) != wanted,
        "padding before an index or not -1": ((got == -1) == in_place).any(-1),
        "an index outside [0, length)": ((got < -1) | (got >= lengths[:, None])).any(-1),
        "an index twice": ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(-1),
    }
    any_broken = torch.stack(list(broken.values())).any(0)
    count = int(any_broken.sum())
    detail = f"{got.shape[0]} rows in form"
    if count:
        row = int(any_broken.to(torch.int64).argmax())
        rules = "; ".join(rule for rule, rows in broken.items() if bool(rows[row]))
        selected = int((got[row] >= 0).sum())
        detail = f"row {row}: {rules} (got {selected} of {int(wanted[row])} indexes, length {int(lengths[row])})"
    return GateResult("topk.structure", count == 0, float(count), 0.0, detail)


def rounding_gap(
    q_values_THD: Tensor,
    gates_TH: Tensor,
    k_values_ND: Tensor,
    k_scale_N: Tensor,
    boundary_T: Tensor,
    flip_share: float = FLIP_SHARE,
) -> Tensor:
    """How far apart correct implementations may put the scores around each row's k-th, float64 [T].

    Their fp32 sums differ in order, so bf16 entries of q and k differ by a unit here and there, and fp8 entries by a step. If
    each entry of q[t, h] and of the k-th key k flips by one step with chance f, independently, the score's difference has the variance

        k_scale^2 f ( sum_d (step(k_d) sum_h w_h q_hd)^2 + sum_h w_h^2 sum_d (step(q_hd) k_d)^2 ),   h over heads with q_h . k > 0

    to first order. The gap is GAP_DEVIATIONS of its root. A k-th key without an active head scores 0 however it is rounded; those about it do not,
    and every head counts.

    Args:
        q_values_THD: R2's quantised queries.
        gates_TH: R2's head gates.
        k_values_ND: R2's quantised keys.
        k_scale_N: Their scales.
        boundary_T: Packed index of each row's k-th key (any visible key for a row that selects all it sees).
        flip_share: f.
    """
    q, boundary = as_float64(q_values_THD), boundary_T.cpu()
    k_TD, scale_T = as_float64(k_values_ND)[boundary], as_float64(k_scale_N)[boundary]
    active_TH = torch.einsum("thd,td->th", q, k_TD) > 0
    active_TH |= ~active_TH.any(-1, keepdim=True)
    gates_TH = as_float64(gates_TH) * active_TH
    summed_TD = torch.einsum("th,thd->td", gates_TH, q)
    from_k = (fp8_step(k_TD) * summed_TD).square().sum(-1)
    from_q = torch.einsum("th,thd,td->t", gates_TH.square(), fp8_step(q).square(), k_TD.square())
    return GAP_DEVIATIONS * scale_T * (flip_share * (from_k + from_q)).sqrt()


def boundary_keys(ref_scores_TN: Tensor, ks_T: Tensor, ke_T: Tensor, topk: int) -> Tensor:
    """Packed index of the last key that R2 selects in each row, int64 [T]; ks for a row that sees nothing."""
    chosen = topk_rows(ref_scores_TN, ks_T, ke_T, topk)
    last = ((chosen >= 0).sum(-1) - 1).clamp(min=0)
    return chosen.gather(1, last[:, None])[:, 0].clamp(min=0) + ks_T.cpu()


def compare_topk(
    got_TK: Tensor,
    ref_scores_TN: Tensor,
    ks_T: Tensor,
    ke_T: Tensor,
    topk: int,
    gap_T: Tensor,
    min_recall: float = MIN_RECALL,
) -> TopkResult:
    """Top-k rows against R2's scores: in form, nearly the same set, and swapped only where rounding can swap.

    An index that got in may score at most `gap` below R2's k-th, one that was left out at most `gap` above it. Order is free.

    Args:
        got_TK: Indexes relative to ks, -1 after the last.
        ref_scores_TN: R2's logits of the same rows, unmasked.
        ks_T: Start of each row's visible keys.
        ke_T: Their end, exclusive.
        topk: K.
        gap_T: From `rounding_gap`.
        min_recall: Least recall; SPARE_SWAPS come free.
    """
    ks, ke = ks_T.cpu().to(torch.int64), ke_T.cpu().to(torch.int64)
    structure = check_topk_structure(got_TK, ke - ks, topk)
    if not structure.ok:
        return TopkResult(False, 0.0, math.inf, 0.0, 0, structure.detail)
    scores = as_float64(ref_scores_TN)
    chosen_TK = topk_rows(scores, ks, ke, topk)
    ours, theirs = _membership(chosen_TK, ks, scores.shape[1]), _membership(got_TK.cpu().to(torch.int64), ks, scores.shape[1])
    contested = ke - ks > topk
    total = int(contested.sum()) * topk
    kth = scores.gather(1, boundary_keys(scores, ks, ke, topk)[:, None])
    distance = torch.where(ours ^ theirs, (scores - kth).abs(), torch.zeros_like(scores))
    swapped = distance > 0
    swaps = max(int((theirs & swapped).sum()), int((ours & swapped).sum()))
    recall = 1 - swaps / total if total else 1.0
    if not swaps:
        return TopkResult(
            True, recall, 0.0, 0.0, 0, f"no swap; {int(contested.sum())} of {ks.numel()} rows see more than {topk} keys"
        )
    share = torch.where(swapped, distance / gap_T[:, None], torch.zeros_like(distance))
    row, key = divmod(int(share.argmax()), scores.shape[1])
    gap, bound = float(distance[row, key]), float(gap_T[row])
    side = "got in" if bool(theirs[row, key]) else "was left out"
    detail = (
        f"row {row}, index {key - int(ks[row])} {side}: R2 scores it {float(scores[row, key])!r}, its k-th {float(kth[row])!r}; "
        f"recall {recall:.6f}, {swaps} swaps"
    )
    few = swaps <= SPARE_SWAPS + (1 - min_recall) * total
    return TopkResult(gap <= bound and few, recall, gap, bound, swaps, detail)


def _membership(indexes_TK: Tensor, ks_T: Tensor, keys: int) -> Tensor:
    """Selected keys as a mask [T, N]; the spare column takes the padding."""
    packed = torch.where(indexes_TK >= 0, indexes_TK + ks_T[:, None], torch.full_like(indexes_TK, keys))
    mask = torch.zeros(indexes_TK.shape[0], keys + 1, dtype=torch.bool)
    return mask.scatter_(1, packed, True)[:, :keys]
