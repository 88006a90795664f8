"""What CP ranks select together is what one rank selects, and what the reference says; exact where arithmetic is."""

from __future__ import annotations

import pytest
import torch

from experiments.names import Split
from experiments.spec.dims import DimsSpec
from experiments.workload.step import Step
from tests.conftest import make_step
from workers.indexer import stages
from workers.indexer.reference import Reference, packed_ranges, topk_rows
from workers.indexer.rope import RotaryTable, apply_rope
from workers.indexer.weights import seeded_weights
from workers.splits import plan
from workers.splits.plan import causal_ranges

DIMS = DimsSpec(name="small", hidden=96, q_lora_rank=64, num_heads=8, topk=16, num_layers=1)


def scored(step: Step, q8: torch.Tensor, k8: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """R2's logits of all step tokens over all packed keys, unit scales, by the definition."""
    reference = Reference(DIMS, seeded_weights(DIMS, 0), rounding=True)
    return reference.logits(q8.double(), k8.double(), torch.ones(len(k8), dtype=torch.float64), gates.double())


@pytest.mark.parametrize("split", list(Split))
@pytest.mark.parametrize("cp_size", [1, 2, 3, 4])
@pytest.mark.parametrize("shapes", [[(0, 50)], [(30, 41)], [(0, 33), (17, 40)], [(9, 16), (0, 31), (64, 23)]])
def test_integer_logits_select_what_r2_selects(split, cp_size, shapes):
    """Integers below 2^24 are exact in fp32, so scores are equal and only ties may be chosen differently."""
    step = make_step(*shapes)
    generator = torch.Generator().manual_seed(cp_size)
    q8 = torch.randint(-3, 4, (step.new_tokens, DIMS.num_heads, 128), generator=generator).float()
    k8 = torch.randint(-3, 4, (step.kv_tokens, 128), generator=generator).float()
    gates = torch.randint(0, 4, (step.new_tokens, DIMS.num_heads), generator=generator).float()
    truth = scored(step, q8, k8, gates)
    ks, ke, _ = (torch.tensor(column) for column in zip(*packed_ranges(step), strict=True))
    wanted = topk_rows(truth, ks, ke, DIMS.topk)
    ranges = causal_ranges(step)
    seen = 0
    for rank in range(cp_size):
        rows = plan(split, step, cp_size, rank).local_rows_T
        fp8 = torch.float8_e4m3fn
        chosen = stages.select(
            q8[rows].to(fp8),
            k8.to(fp8),
            torch.ones(len(k8)),
            gates[rows],
            ranges.ks_S[rows],
            ranges.ke_S[rows],
            DIMS.topk,
            chunks(ranges.ke_S[rows], len(k8), logits_mib=1),
        )
        for local, row in enumerate(rows.tolist()):
            segment = truth[row, int(ks[row]) :]
            ours = chosen[local][chosen[local] >= 0].long()
            theirs = wanted[row][wanted[row] >= 0]
            assert len(ours.unique()) == len(theirs)
            assert torch.equal(segment[ours].sort().values, segment[theirs].sort().values)
            seen += 1
    assert seen == step.new_tokens


def chunks(ke: torch.Tensor, num_keys: int, logits_mib: int = 64) -> tuple[stages.RowRange, ...]:
    return stages.row_ranges(ke, num_keys, stages.bytes_per_logit(DIMS.num_heads), logits_mib)


def rotated_keys(weights, x, positions):
    k = stages.norm_k(stages.project(x, weights.wk), weights.k_norm_weight, weights.k_norm_bias)
    return stages.hadamard(apply_rope(k, *RotaryTable(DIMS).cos_sin(positions), DIMS))


def selections(step: Step, split: Split, cp_size: int) -> torch.Tensor:
    """Top-k of all step tokens as c ranks find them, put back in token order."""
    weights = seeded_weights(DIMS, 1)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(step.new_tokens, DIMS.hidden, generator=generator).bfloat16()
    q_lora = torch.randn(step.new_tokens, DIMS.q_lora_rank, generator=generator).bfloat16()
    prefix_x = torch.randn(step.kv_tokens - step.new_tokens, DIMS.hidden, generator=generator).bfloat16()
    ranges = causal_ranges(step)
    packed = torch.empty(step.kv_tokens, 128, dtype=torch.bfloat16)
    prefix_positions = torch.cat([torch.arange(s.prefix_tokens) for s in step.sequences])
    packed[ranges.prefix_rows] = rotated_keys(weights, prefix_x, prefix_positions)
    table = RotaryTable(DIMS)
    plans = [plan(split, step, cp_size, rank) for rank in range(cp_size)]
    for p in plans:
        rows = p.local_rows_T
        packed[ranges.packed_rows_S[rows]] = rotated_keys(weights, x[rows], ranges.positions_S[rows])
    k8, k_scale = stages.quantise_k(packed)
    out = torch.empty(step.new_tokens, DIMS.topk, dtype=torch.int32)
    for p in plans:
        rows = p.local_rows_T
        q = stages.project(q_lora[rows], weights.wq_b).view(-1, DIMS.num_heads, 128)
        q = stages.hadamard(apply_rope(q, *table.cos_sin(ranges.positions_S[rows]), DIMS))
        q8, q_scale = stages.quantise_q(q)
        gates = stages.head_gates(x[rows], weights.weights_proj, q_scale, 128)
        ks, ke = ranges.ks_S[rows], ranges.ke_S[rows]
        out[rows] = stages.select(q8, k8, k_scale, gates, ks, ke, DIMS.topk, chunks(ke, len(k8)))
    return out


@pytest.mark.parametrize("split", list(Split))
@pytest.mark.parametrize("cp_size", [2, 3, 4])
@pytest.mark.parametrize("shapes", [[(0, 200)], [(100, 150), (0, 77)]])
def test_cp_ranks_select_what_one_rank_selects(split, cp_size, shapes):
    """A projection's bits may depend on its number of rows; a selection hardly."""
    step = make_step(*shapes)
    one, many = selections(step, split, 1), selections(step, split, cp_size)
    same = sum(len(set(a) & set(b) - {-1}) for a, b in zip(one.tolist(), many.tolist(), strict=True))
    assert same / int((one >= 0).sum()) >= 0.999
    assert torch.equal((one >= 0).sum(1), (many >= 0).sum(1))
