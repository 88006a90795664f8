"""`serial` against the references: stage by stage on the stage's own inputs, and the whole through top-k on sampled rows.

R2 gates; R1 is reported. Every rank judges rows of its own, against keys that it computes from all tokens by itself: nothing that was
gathered takes part in the truth, so a wrong plan or a wrong order of rows can not hide.

Legend: T sampled rows, S step tokens, N packed keys, H heads, D head dim, K top-k.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from workers.indexer import gates
from workers.indexer.gates import GateResult
from workers.indexer.reference import Reference, packed_ranges, topk_rows
from workers.indexer.stage_sets import StageSettings
from workers.messages import Fault
from workers.prepared_cell import PreparedCell

KEY_CHUNK = 4096
ROTATED_KEY_SLACK = 2.0**-4
"""Gathered keys against R2's, as a share of the row's largest entry: three roundings to bf16 and the turn of an angle at 1e5 lie
well inside it, another token's key far outside."""


@dataclass(frozen=True)
class ReferenceReport:
    """What one rank found. `recall` is R2's, `recall_unrounded` R1's; `gates` are (stage, worst, bound)."""

    faults: tuple[Fault, ...]
    num_checks: int
    recall: float
    recall_unrounded: float
    gates: tuple[tuple[str, float, float], ...]


def check_against_references(cell: PreparedCell, step: int, num_rows: int, settings: StageSettings) -> ReferenceReport:
    """Judges this rank's `serial` in one step, on input set 0; of a chain its first layer: the others differ by weights and inputs alone."""
    index = 0
    rows_T = sampled_rows(cell, step, num_rows)
    r2 = Reference(cell.cell.dims, cell.weights, rounding=True)
    r1 = Reference(cell.cell.dims, cell.weights, rounding=False)
    keys_SD = _reference_keys(cell, r2, step, index)
    results = [
        *_stage_gates(cell, r2, step, index, rows_T, settings),
        _key_gate(cell.correct(step, index, settings.unchained).keys_SD[0].cpu(), keys_SD),
    ]
    topk_TK = cell.finish_correct(step, index, 1, settings).cpu()[rows_T]
    tokens_T = cell.steps[step].plan.local_rows_T[rows_T]
    ks_T, ke_T, _ = (torch.tensor(column)[tokens_T] for column in zip(*packed_ranges(cell.cell.steps[step]), strict=True))
    topk = cell.cell.dims.topk

    q, k, scale, w = _quantised(cell, r2, step, index, tokens_T, keys_SD)
    scores_TN = r2.logits(q, k, scale, w)
    boundary_T = gates.boundary_keys(scores_TN, ks_T, ke_T, topk)
    gap_T = gates.rounding_gap(q, w, k, scale, boundary_T)
    whole = gates.compare_topk(topk_TK, scores_TN, ks_T, ke_T, topk, gap_T)
    unrounded_TN = r1.logits(*_quantised(cell, r1, step, index, tokens_T, _reference_keys(cell, r1, step, index)))
    results.append(GateResult("topk", whole.ok, whole.worst_swap_gap, whole.gap_bound, whole.detail))
    return ReferenceReport(
        faults=tuple(Fault("*", f"R2 {r.stage}", f"step {step}: {r.detail}") for r in results if not r.ok),
        num_checks=len(results),
        recall=whole.recall,
        recall_unrounded=_recall(topk_TK, topk_rows(unrounded_TN, ks_T, ke_T, topk)),
        gates=tuple((r.stage, r.worst, r.bound) for r in results),
    )


def sampled_rows(cell: PreparedCell, step: int, num_rows: int) -> torch.Tensor:
    """Local rows, int64: the first and the last of each block (where plans go wrong), and others evenly between, `num_rows` at least."""
    plan = cell.steps[step].plan
    edges = {row for start, end in plan.blocks for row in (start, end - 1)}
    spread = {round(i * (plan.local_tokens - 1) / max(1, num_rows - 1)) for i in range(num_rows)}
    return torch.tensor(sorted(edges | spread))


def _stage_gates(
    cell: PreparedCell, r2: Reference, step: int, index: int, rows_T: torch.Tensor, settings: StageSettings
) -> list[GateResult]:
    """Each stage on what the stage before it really produced."""
    dims, w = cell.cell.dims, cell.weights
    shard = cell.shard(step, index)
    here = rows_T.to(cell.device)
    x, q_lora, cos, sin = shard.x_TX[here], shard.q_lora_TR[here], shard.cos_TF[here], shard.sin_TF[here]
    tokens_T = cell.steps[step].plan.local_rows_T[rows_T]
    positions = torch.tensor([position for _, _, position in packed_ranges(cell.cell.steps[step])])[tokens_T]
    ops = cell.layers[settings][0].ops
    q0 = ops.project(q_lora, w.wq_b).view(-1, dims.num_heads, dims.head_dim)
    k0 = ops.project(x, w.wk)
    k1 = ops.norm_k(k0, w.k_norm_weight, w.k_norm_bias)
    q2, k2 = ops.rope(q0, k1, cos, sin, dims)
    q3, k3 = ops.hadamard(q2), ops.hadamard(k2)
    q8, q_scale = ops.quantise_q(q3)
    k8, k_scale = ops.quantise_k(k3)
    head_gates = ops.head_gates(x, w.weights_proj, q_scale, dims.head_dim)
    ks, ke = (torch.full((len(rows_T),), end, dtype=torch.int32, device=cell.device) for end in (0, len(rows_T)))
    logits = ops.mqa_logits(q8, k8, k_scale, head_gates, ks, ke)
    made = x, q_lora, q0, k0, k1, q2, k2, q3, k3, q8, q_scale, k8, k_scale, head_gates, logits, ks, ke
    x, q_lora, q0, k0, k1, q2, k2, q3, k3, q8, q_scale, k8, k_scale, head_gates, logits, ks, ke = (t.cpu() for t in made)
    return [
        gates.gate_project_q(r2, q_lora, q0),
        gates.gate_project_k(r2, x, k0),
        gates.gate_norm_k(r2, k0, k1),
        gates.gate_rope(r2, "rope.q", q0, positions, q2),
        gates.gate_rope(r2, "rope.k", k1, positions, k2),
        gates.gate_hadamard(r2, "hadamard.q", q2, q3),
        gates.gate_hadamard(r2, "hadamard.k", k2, k3),
        *gates.gate_quantise_q(r2, q3, q8, q_scale),
        *gates.gate_quantise_k(r2, k3, k8, k_scale),
        gates.gate_head_gates(r2, x, q_scale, head_gates),
        gates.gate_logits(r2, q8, k8, k_scale, head_gates, ks, ke, logits, ops.logits_slack),
    ]


def _key_gate(got_SD: torch.Tensor, exact_SD: torch.Tensor) -> GateResult:
    """Every gathered key against the reference's of the token that should stand there."""
    largest_S = exact_SD.abs().amax(1).clamp_min(1e-30)
    error_S = (got_SD.double() - exact_SD).abs().amax(1).nan_to_num(torch.inf) / largest_S
    token = int(error_S.argmax())
    worst = float(error_S[token])
    detail = f"token {token}: off by {worst:.3g} of its key's largest entry"
    return GateResult("gathered keys", worst <= ROTATED_KEY_SLACK, worst, ROTATED_KEY_SLACK, detail)


def _reference_keys(cell: PreparedCell, reference: Reference, step: int, index: int) -> torch.Tensor:
    """Rotated keys of the step's own tokens by the definition, float64 [S, D], from all tokens' hidden states."""
    positions_S = torch.tensor([position for _, _, position in packed_ranges(cell.cell.steps[step])])
    chunks = torch.split(torch.arange(len(positions_S)), KEY_CHUNK)
    return torch.cat([reference.keys(cell.pool.x_rows(tokens, index), positions_S[tokens]) for tokens in chunks])


def _quantised(
    cell: PreparedCell, reference: Reference, step: int, index: int, tokens_T: torch.Tensor, keys_SD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the reference's logits take: q [T, H, D], packed keys [N, D] with their scales [N], gates [T, H]."""
    ranges = packed_ranges(cell.cell.steps[step])
    packed_S = torch.tensor([ks + position for ks, _, position in ranges])
    positions_S = torch.tensor([position for _, _, position in ranges])
    keys_ND = torch.empty(cell.cell.steps[step].kv_tokens, cell.cell.dims.head_dim, dtype=torch.float64)
    keys_ND[packed_S] = keys_SD
    is_prefix = torch.ones(len(keys_ND), dtype=torch.bool)
    is_prefix[packed_S] = False
    prefix_rows, start = is_prefix.nonzero()[:, 0], 0
    for positions, x in cell.pool.prefix_chunks(cell.cell.steps[step]):
        keys_ND[prefix_rows[start : start + len(positions)]] = reference.keys(x, positions)
        start += len(positions)
    q, q_scale = reference.quantise_q(reference.queries(cell.pool.q_lora_rows(tokens_T, index), positions_S[tokens_T]))
    k, k_scale = reference.quantise_k(keys_ND)
    return q, k, k_scale, reference.head_gates(cell.pool.x_rows(tokens_T, index), q_scale)


def _recall(got_TK: torch.Tensor, wanted_TK: torch.Tensor) -> float:
    pairs = zip(got_TK.tolist(), wanted_TK.tolist(), strict=True)
    found = sum(len(set(got) & set(wanted) - {-1}) for got, wanted in pairs)
    return found / max(1, int((wanted_TK >= 0).sum()))
