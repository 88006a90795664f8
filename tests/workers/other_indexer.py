"""Another lightning indexer: a float32 re-implementation that shares no line with the reference or with the stages of `workers`.

Sums in other orders, rotations by complex numbers, butterflies for Hadamard's matrix, logarithms for exponents. The gates have to let
it pass with every accumulation below; a subclass that overrides one method is a mutant.

Shape suffixes: T rows, N packed keys, H heads, D head dim, K top-k, X hidden, R q_lora rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.spec.dims import DimsSpec
from experiments.workload.step import Step
from workers.indexer import gates
from workers.indexer.gates import GateResult, TopkResult
from workers.indexer.reference import Reference, ReferenceWeights, packed_ranges, topk_rows

Product = Callable[[Tensor, Tensor], Tensor]
"""x [T, in] and weight [out, in], bf16, to float32 [T, out]."""


def random_weights(dims: DimsSpec, seed: int = 0) -> ReferenceWeights:
    """N(0, 1) / sqrt(fan in) in bf16; a norm whose weight and bias do something."""
    g = torch.Generator().manual_seed(seed)

    def linear(rows: int, columns: int) -> Tensor:
        return (torch.randn(rows, columns, generator=g) / math.sqrt(columns)).to(torch.bfloat16)

    return ReferenceWeights(
        wq_b=linear(dims.num_heads * dims.head_dim, dims.q_lora_rank),
        wk=linear(dims.head_dim, dims.hidden),
        k_norm_weight=1 + 0.1 * torch.randn(dims.head_dim, generator=g),
        k_norm_bias=0.1 * torch.randn(dims.head_dim, generator=g),
        weights_proj=linear(dims.num_heads, dims.hidden),
    )


@dataclass(frozen=True)
class Case:
    """Inputs of one step: hidden states of all packed tokens, latent queries of some rows of the new ones."""

    dims: DimsSpec
    weights: ReferenceWeights
    x_NX: Tensor
    positions_N: Tensor
    q_lora_TR: Tensor
    x_TX: Tensor
    positions_T: Tensor
    ks_T: Tensor
    ke_T: Tensor

    @property
    def r2(self) -> Reference:
        return Reference(self.dims, self.weights, rounding=True)


def make_case(dims: DimsSpec, step: Step, rows: int, seed: int = 0) -> Case:
    """Random inputs of a step; `rows` of its new tokens ask, drawn at random."""
    g = torch.Generator().manual_seed(1000 + seed)
    x_NX = torch.randn(step.kv_tokens, dims.hidden, generator=g).to(torch.bfloat16)
    positions_N = torch.cat([torch.arange(s.prefix_tokens + s.new_tokens) for s in step.sequences])
    ranges = torch.tensor(packed_ranges(step))
    chosen = ranges[torch.randperm(ranges.shape[0], generator=g)[:rows].sort().values]
    ks, ke, positions = chosen.unbind(1)
    q_lora = torch.randn(chosen.shape[0], dims.q_lora_rank, generator=g).to(torch.bfloat16)
    return Case(dims, random_weights(dims, seed), x_NX, positions_N, q_lora, x_NX[ke - 1], positions, ks, ke)


def accumulate_fp32(x: Tensor, weight: Tensor) -> Tensor:
    """float32 products in the library's order."""
    return x.float() @ weight.float().T


def accumulate_bf16_gemm(x: Tensor, weight: Tensor) -> Tensor:
    """The library's bf16 matmul: what a model runs."""
    return torch.nn.functional.linear(x, weight).float()


def accumulate_in(dtype: torch.dtype, block: int) -> Product:
    """One accumulator of `dtype` that walks the inner axis block by block."""

    def product(x: Tensor, weight: Tensor) -> Tensor:
        total = torch.zeros(x.shape[0], weight.shape[0], dtype=dtype)
        for at in range(0, x.shape[1], block):
            total = (total.float() + x[:, at : at + block].float() @ weight[:, at : at + block].float().T).to(dtype)
        return total.float()

    return product


@dataclass(frozen=True)
class OtherIndexer:
    """The stages in float32 and bf16."""

    dims: DimsSpec
    weights: ReferenceWeights
    matmul: Product = accumulate_fp32
    table_dtype: torch.dtype = torch.float64
    """float32 gives the tables that most implementations have. They pass every gate of a stage, and move selections at long positions."""

    def project_q(self, q_lora_TR: Tensor) -> Tensor:
        return self.matmul(q_lora_TR, self.weights.wq_b).to(torch.bfloat16).view(-1, self.dims.num_heads, 128)

    def project_k(self, x_TX: Tensor) -> Tensor:
        return self.matmul(x_TX, self.weights.wk).to(torch.bfloat16)

    def norm_k(self, k_TD: Tensor) -> Tensor:
        w = self.weights
        return torch.nn.functional.layer_norm(k_TD.float(), (128,), w.k_norm_weight, w.k_norm_bias, 1e-6).to(torch.bfloat16)

    def frequencies(self) -> Tensor:
        """Radians a position of each pair, float32 [rope_dim / 2]: taken in `table_dtype` and rounded once."""
        dims, half, wide = self.dims, self.dims.rope_dim // 2, self.table_dtype
        exponent = torch.arange(0, dims.rope_dim, 2, dtype=wide) / dims.rope_dim
        frequency = 1.0 / (torch.tensor(dims.rope_theta, dtype=wide) ** exponent)
        if dims.yarn is None:
            return frequency.float()
        base = math.log(dims.rope_theta)
        turns = [math.log(dims.yarn.original_positions / (b * 2 * math.pi)) for b in (dims.yarn.beta_fast, dims.yarn.beta_slow)]
        low, high = (dims.rope_dim * t / (2 * base) for t in turns)
        low, high = max(math.floor(low), 0), min(math.ceil(high), dims.rope_dim - 1)
        keep = 1 - ((torch.arange(half, dtype=wide) - low) / (high - low)).clamp(0, 1)
        return (frequency / dims.yarn.factor * (1 - keep) + frequency * keep).float()

    def rope(self, x: Tensor, positions_T: Tensor) -> Tensor:
        """Queries [T, H, D] or keys [T, D]."""
        dims, half = self.dims, self.dims.rope_dim // 2
        angle = torch.outer(positions_T.float(), self.frequencies())
        turn = torch.polar(torch.ones_like(angle), angle)
        if x.dim() == 3:
            turn = turn[:, None]
        head = x[..., : dims.rope_dim].float()
        if dims.rope_style == "neox":
            turned = torch.complex(head[..., :half], head[..., half:]) * turn
            head = torch.cat([turned.real, turned.imag], -1)
        else:
            turned = torch.complex(head[..., 0::2], head[..., 1::2]) * turn
            head = torch.stack([turned.real, turned.imag], -1).flatten(-2)
        return torch.cat([head.to(torch.bfloat16), x[..., dims.rope_dim :]], -1)

    def hadamard(self, x: Tensor) -> Tensor:
        """Queries [T, H, D] or keys [T, D]."""
        y = x.float()
        for bit in range(7):
            pairs = y.view(*x.shape[:-1], -1, 2, 1 << bit)
            y = torch.stack([pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]], -2).view(x.shape)
        return (y * 128**-0.5).to(torch.bfloat16)

    def quantise_q(self, q_THD: Tensor) -> tuple[Tensor, Tensor]:
        amax = q_THD.float().abs().amax(-1).clamp(min=1e-4)
        scale = torch.exp2(torch.ceil(torch.log2(amax / 448)))
        return (q_THD.float() / scale[..., None]).clamp(-448, 448).to(torch.float8_e4m3fn), scale

    def quantise_k(self, k_ND: Tensor) -> tuple[Tensor, Tensor]:
        scale = k_ND.float().abs().amax(-1).clamp(min=1e-4) / torch.full((1,), 448.0)
        return (k_ND.float() * (1.0 / scale)[:, None]).clamp(-448, 448).to(torch.float8_e4m3fn), scale

    def head_gates(self, x_TX: Tensor, q_scale_TH: Tensor) -> Tensor:
        return accumulate_fp32(x_TX, self.weights.weights_proj) * self.dims.num_heads**-0.5 * q_scale_TH * 128**-0.5

    def logits(self, q_values: Tensor, k_values: Tensor, k_scale: Tensor, gates_TH: Tensor) -> Tensor:
        keys_DN = k_values.float().T
        out = [(gate @ (q @ keys_DN).relu_()) * k_scale for q, gate in zip(q_values.float(), gates_TH, strict=True)]
        return torch.stack(out)

    def select(self, logits_TN: Tensor, ks_T: Tensor, ke_T: Tensor) -> Tensor:
        return topk_rows(logits_TN, ks_T, ke_T, self.dims.topk)


@dataclass(frozen=True)
class Flow:
    """What each stage of an implementation gave, in order."""

    q: tuple[Tensor, Tensor, Tensor]
    k: tuple[Tensor, Tensor, Tensor, Tensor]
    q8: tuple[Tensor, Tensor]
    k8: tuple[Tensor, Tensor]
    gates: Tensor
    logits: Tensor
    topk: Tensor


def run(other: OtherIndexer, case: Case) -> Flow:
    q0 = other.project_q(case.q_lora_TR)
    q1 = other.rope(q0, case.positions_T)
    q2 = other.hadamard(q1)
    k0 = other.project_k(case.x_NX)
    k1 = other.norm_k(k0)
    k2 = other.rope(k1, case.positions_N)
    k3 = other.hadamard(k2)
    q8, k8 = other.quantise_q(q2), other.quantise_k(k3)
    gates_TH = other.head_gates(case.x_TX, q8[1])
    logits = other.logits(q8[0], k8[0], k8[1], gates_TH)
    return Flow((q0, q1, q2), (k0, k1, k2, k3), q8, k8, gates_TH, logits, other.select(logits, case.ks_T, case.ke_T))


def judge_stages(flow: Flow, case: Case, r2: Reference) -> list[GateResult]:
    """Every stage gate on the inputs that the stage was given."""
    q, k = flow.q, flow.k
    return [
        gates.gate_project_q(r2, case.q_lora_TR, q[0]),
        gates.gate_rope(r2, "rope_q", q[0], case.positions_T, q[1]),
        gates.gate_hadamard(r2, "hadamard_q", q[1], q[2]),
        gates.gate_project_k(r2, case.x_NX, k[0]),
        gates.gate_norm_k(r2, k[0], k[1]),
        gates.gate_rope(r2, "rope_k", k[1], case.positions_N, k[2]),
        gates.gate_hadamard(r2, "hadamard_k", k[2], k[3]),
        *gates.gate_quantise_q(r2, q[2], *flow.q8),
        *gates.gate_quantise_k(r2, k[3], *flow.k8),
        gates.gate_head_gates(r2, case.x_TX, flow.q8[1], flow.gates),
        gates.gate_logits(r2, flow.q8[0], *flow.k8, flow.gates, case.ks_T, case.ke_T, flow.logits),
    ]


@dataclass(frozen=True)
class Truth:
    """The whole flow of R2 on a step's inputs, and the gap of each row."""

    scores_TN: Tensor
    gap_T: Tensor

    @classmethod
    def of(cls, case: Case, r2: Reference) -> Truth:
        q_values, q_scale = r2.quantise_q(r2.queries(case.q_lora_TR, case.positions_T))
        k_values, k_scale = r2.quantise_k(r2.keys(case.x_NX, case.positions_N))
        gates_TH = r2.head_gates(case.x_TX, q_scale)
        scores = r2.logits(q_values, k_values, k_scale, gates_TH)
        boundary = gates.boundary_keys(scores, case.ks_T, case.ke_T, case.dims.topk)
        return cls(scores, gates.rounding_gap(q_values, gates_TH, k_values, k_scale, boundary))

    def judge(self, topk_TK: Tensor, case: Case, min_recall: float = gates.MIN_RECALL) -> TopkResult:
        return gates.compare_topk(topk_TK, self.scores_TN, case.ks_T, case.ke_T, case.dims.topk, self.gap_T, min_recall)
