"""The gates let correct float32 re-implementations pass, and stop every mutant at the stage that is wrong."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from experiments.spec.dims import PRESETS, DimsSpec, YarnSpec
from tests.conftest import MINI, make_step
from tests.workers.mutants_of_stages import CHOICE_MUTANTS, FORM_MUTANTS, STAGE_MUTANTS, WithoutYarn
from tests.workers.other_indexer import (
    Case,
    OtherIndexer,
    Truth,
    accumulate_bf16_gemm,
    accumulate_fp32,
    accumulate_in,
    judge_stages,
    make_case,
    random_weights,
    run,
)
from workers.indexer import gates
from workers.indexer.reference import Reference

V32 = DimsSpec(name="v32_small", hidden=1024, q_lora_rank=256, num_heads=16, topk=48, num_layers=1, yarn=YarnSpec())
GLM = DimsSpec(
    name="glm_small", hidden=768, q_lora_rank=384, num_heads=32, topk=48, num_layers=1, rope_style="interleaved", rope_theta=8e6
)
RIGHT = {
    "fp32": accumulate_fp32,
    "bf16 gemm": accumulate_bf16_gemm,
    "one by one": accumulate_in(torch.float32, 1),
    "by sixteen": accumulate_in(torch.float32, 16),
}
STEPS = {
    "one": make_step((0, 300)),
    "one with prefix": make_step((200, 100)),
    "two": make_step((0, 90), (0, 130)),
    "three with prefixes": make_step((100, 80), (0, 60), (33, 50)),
}


def with_hard_rows(case: Case) -> Case:
    """A query of zeros, whose scale comes from the floor, and keys so small that the norm's eps shows."""
    x_NX, q_lora_TR = case.x_NX.clone(), case.q_lora_TR.clone()
    x_NX[5:8] *= 2.0**-10
    q_lora_TR[2] = 0
    return replace(case, x_NX=x_NX, x_TX=x_NX[case.ke_T - 1], q_lora_TR=q_lora_TR)


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS.keys())
@pytest.mark.parametrize("dims", [MINI, V32, GLM], ids=lambda dims: dims.name)
def test_right_implementations_pass_every_gate(dims, step):
    case = with_hard_rows(make_case(dims, step, rows=40))
    r2 = case.r2
    truth = Truth.of(case, r2)
    for name, matmul in RIGHT.items():
        for table_dtype in (torch.float64, torch.float32):
            flow = run(OtherIndexer(dims, case.weights, matmul, table_dtype), case)
            assert [result for result in judge_stages(flow, case, r2) if not result.ok] == [], name
            whole = truth.judge(flow.topk, case)
            assert whole.ok, (name, whole)


@pytest.mark.parametrize("dims", [PRESETS["deepseek_v32"], PRESETS["glm_5"]], ids=lambda dims: dims.name)
def test_right_projections_of_real_width_pass(dims):
    """Sums of 6144 or 7168 terms, one by one: the widest that the slack is for."""
    weights, g = random_weights(dims), torch.Generator().manual_seed(1)
    r2 = Reference(dims, weights, rounding=True)
    x = torch.randn(4, dims.hidden, generator=g).to(torch.bfloat16)
    for matmul in RIGHT.values():
        other = OtherIndexer(dims, weights, matmul)
        assert gates.gate_project_k(r2, x, other.project_k(x)).ok
        assert gates.gate_head_gates(r2, x, torch.ones(4, dims.num_heads), other.head_gates(x, torch.ones(4, dims.num_heads))).ok
    worse = OtherIndexer(dims, weights, accumulate_in(torch.float16, 16))
    assert not gates.gate_project_k(r2, x, worse.project_k(x)).ok


@pytest.mark.parametrize("dims", PRESETS.values(), ids=PRESETS.keys())
@pytest.mark.parametrize("table_dtype", [torch.float64, torch.float32])
def test_rope_at_position_1e5_passes_and_a_shift_by_one_does_not(dims, table_dtype):
    weights, g = random_weights(MINI), torch.Generator().manual_seed(1)
    r2 = Reference(
        dims.model_copy(update={"hidden": MINI.hidden, "q_lora_rank": MINI.q_lora_rank, "num_heads": 64}), weights, True
    )
    x = torch.randn(200, 128, generator=g).to(torch.bfloat16)
    positions = torch.randint(100_000, 131_072, (200,), generator=g)
    other = OtherIndexer(dims, weights, table_dtype=table_dtype)
    assert gates.gate_rope(r2, "rope", x, positions, other.rope(x, positions)).ok
    assert not gates.gate_rope(r2, "rope", x, positions, other.rope(x, positions + 1)).ok


BROKEN = [(mutant, dims) for mutant in STAGE_MUTANTS for dims in (MINI, V32, GLM) if dims.yarn or mutant is not WithoutYarn]
"""GLM-5 has no YaRN to leave out."""


@pytest.mark.parametrize(("mutant", "dims"), BROKEN, ids=[f"{mutant.__name__}-{dims.name}" for mutant, dims in BROKEN])
def test_a_mutant_fails_at_its_own_gates_and_at_no_other(mutant, dims):
    # Beyond 256 positions bf16 cannot count them.
    case = with_hard_rows(make_case(dims, make_step((400, 100), (0, 60)), rows=24))
    flow = run(mutant(dims, case.weights), case)
    failed = {result.stage for result in judge_stages(flow, case, case.r2) if not result.ok}
    assert failed == STAGE_MUTANTS[mutant]


CHOOSING = make_step((100, 80), (0, 60), (33, 50))


@pytest.mark.parametrize("mutant", FORM_MUTANTS, ids=lambda mutant: mutant.__name__)
def test_a_selection_out_of_form_is_stopped_and_its_rule_named(mutant):
    case = make_case(V32, CHOOSING, rows=190)
    flow = run(mutant(V32, case.weights), case)
    form = gates.check_topk_structure(flow.topk, case.ke_T - case.ks_T, V32.topk)
    assert not form.ok
    assert FORM_MUTANTS[mutant] in form.detail
    assert not Truth.of(case, case.r2).judge(flow.topk, case, min_recall=0).ok


@pytest.mark.parametrize("mutant", CHOICE_MUTANTS, ids=lambda mutant: mutant.__name__)
def test_a_selection_of_wrong_keys_is_stopped_whatever_its_recall(mutant):
    case = make_case(V32, CHOOSING, rows=190)
    flow = run(mutant(V32, case.weights), case)
    assert gates.check_topk_structure(flow.topk, case.ke_T - case.ks_T, V32.topk).ok
    whole = Truth.of(case, case.r2).judge(flow.topk, case, min_recall=0)
    assert not whole.ok
    assert whole.worst_swap_gap > whole.gap_bound
    assert "R2 scores it" in whole.detail


def test_padding_rows_are_all_minus_one():
    lengths = torch.tensor([0, 2])
    assert gates.check_topk_structure(torch.tensor([[-1, -1, -1], [1, 0, -1]]), lengths, 3).ok
    assert not gates.check_topk_structure(torch.tensor([[0, -1, -1], [1, 0, -1]]), lengths, 3).ok


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_not_finite_is_infinitely_wrong(value):
    case = make_case(MINI, make_step((0, 40)), rows=8)
    flow = run(OtherIndexer(MINI, case.weights), case)
    broken = flow.k[0].clone()
    broken[3, 4] = value
    result = gates.gate_project_k(case.r2, case.x_NX, broken)
    assert not result.ok
    assert result.worst == math.inf
    assert result.detail.startswith("row 3, dim 4")


def test_a_wrong_shape_is_refused():
    case = make_case(MINI, make_step((0, 40)), rows=8)
    with pytest.raises(ValueError, match="project_k: got shape"):
        gates.gate_project_k(case.r2, case.x_NX, torch.zeros(39, 128))
    with pytest.raises(ValueError, match="topk: got shape"):
        gates.check_topk_structure(torch.zeros(2, 3), torch.tensor([1, 2]), 4)


def test_the_scale_of_q_may_double_only_where_its_magnitude_is_a_power_of_two():
    """A rounded logarithm may take the next exponent at 448 x 2^n, and nowhere else."""
    q = torch.zeros(2, 1, 128, dtype=torch.bfloat16)
    q[0, 0, 0], q[1, 0, 0] = 448.0, 440.0
    r2 = Reference(MINI, random_weights(MINI), rounding=True)
    values, scale = r2.quantise_q(q)
    assert scale.flatten().tolist() == [1.0, 1.0]
    doubled = torch.tensor([[2.0], [1.0]], dtype=torch.float64)
    assert all(result.ok for result in gates.gate_quantise_q(r2, q, values / doubled[..., None], doubled))
    both = torch.full((2, 1), 2.0, dtype=torch.float64)
    assert not all(result.ok for result in gates.gate_quantise_q(r2, q, values / both[..., None], both))


def test_logits_outside_the_visible_range_are_anyones():
    case = make_case(MINI, make_step((0, 40), (0, 30)), rows=20)
    flow = run(OtherIndexer(MINI, case.weights), case)
    keys = torch.arange(flow.logits.shape[1])
    outside = (keys < case.ks_T[:, None]) | (keys >= case.ke_T[:, None])
    arguments = (case.r2, flow.q8[0], *flow.k8, flow.gates, case.ks_T, case.ke_T)
    assert gates.gate_logits(*arguments, flow.logits.masked_fill(outside, math.nan)).ok
    assert not gates.gate_logits(*arguments, flow.logits.masked_fill(~outside, 0.0)).ok
