"""Top-k on random inputs of realistic length: right implementations find 0.999 of R2's selection and swap inside the stated gap.

The figures behind the bounds stand beside them, in `workers/indexer/gates.py`.
"""

from __future__ import annotations

import pytest
import torch

from experiments.spec.dims import PRESETS
from tests.conftest import MINI, make_step
from tests.workers import mutants_of_stages as mutants
from tests.workers.other_indexer import OtherIndexer, Truth, accumulate_bf16_gemm, accumulate_fp32, make_case, run
from workers.indexer import gates


@pytest.fixture(scope="module")
def long_case():
    """4096 keys and 128 rows of `mini`, and what R2 makes of them."""
    case = make_case(MINI, make_step((0, 4096)), rows=128)
    return case, Truth.of(case, case.r2)


@pytest.mark.parametrize(
    "step",
    [
        make_step((0, 4096)),
        make_step((4096, 4096)),
        make_step((12288, 4096)),
        make_step((2048, 2048), (0, 3000), (1000, 96)),
    ],
    ids=["4K", "4K after 4K", "4K after 12K", "three sequences"],
)
def test_right_implementations_find_what_r2_finds(step):
    case = make_case(MINI, step, rows=64, seed=10)
    truth = Truth.of(case, case.r2)
    for matmul in (accumulate_fp32, accumulate_bf16_gemm):
        whole = truth.judge(run(OtherIndexer(MINI, case.weights, matmul), case).topk, case)
        assert whole.ok, whole
        assert whole.recall >= 0.999
        assert whole.worst_swap_gap <= whole.gap_bound


def test_the_shapes_of_deepseek_v32():
    """Top-k 2048 of 8K keys, on few rows. Float32 tables swap wider than one deviation here: 1.36."""
    dims = PRESETS["deepseek_v32"]
    case = make_case(dims, make_step((6144, 2048)), rows=12)
    truth = Truth.of(case, case.r2)
    for table_dtype in (torch.float64, torch.float32):
        whole = truth.judge(run(OtherIndexer(dims, case.weights, accumulate_bf16_gemm, table_dtype), case).topk, case)
        assert whole.ok, whole
        assert whole.recall >= 0.999


@pytest.mark.parametrize("num_heads", [1, 2, 4])
def test_few_heads_leave_many_keys_at_a_score_of_nought(num_heads):
    """Rows whose heads all weigh negative select among keys that no head is active for: any of them is right, and those beside them have a gap."""
    dims = MINI.model_copy(update={"num_heads": num_heads})
    for seed in range(4):
        case = make_case(dims, make_step((0, 2048)), rows=64, seed=seed)
        truth = Truth.of(case, case.r2)
        assert (truth.gap_T > 0).all()
        whole = truth.judge(run(OtherIndexer(dims, case.weights, accumulate_fp32), case).topk, case)
        assert whole.ok, whole
        assert whole.recall >= 0.999


def test_only_keys_that_tie_with_the_kth_are_interchangeable():
    scores_TN = torch.tensor([[0.0, 3.0, 0.0, 0.0, -1.0, 2.0]])
    ks_T, ke_T, gap_T = torch.tensor([0]), torch.tensor([6]), torch.tensor([0.5])

    def judge(*indexes: int):
        return gates.compare_topk(torch.tensor([indexes]), scores_TN, ks_T, ke_T, 3, gap_T)

    for tied in (0, 2, 3):
        assert judge(1, 5, tied).ok
        assert judge(1, 5, tied).recall == 1
    lower, without_second = judge(1, 5, 4), judge(1, 2, 3)
    assert not lower.ok
    assert (lower.swaps, lower.worst_swap_gap) == (1, 1.0)
    assert not without_second.ok  # of two ties that got in one is free, and one stands in for a better key
    assert (without_second.swaps, without_second.worst_swap_gap) == (1, 2.0)


def test_tables_of_float32_powers_swap_inside_the_gap_and_cost_recall():
    """Angles at position 16K are then off by 0.001 rad: right by every stage's gate, and not quite the same selection."""
    case = make_case(MINI, make_step((12288, 4096)), rows=64)
    truth = Truth.of(case, case.r2)
    flow = run(OtherIndexer(MINI, case.weights, table_dtype=torch.float32), case)
    assert not truth.judge(flow.topk, case).ok
    lenient = truth.judge(flow.topk, case, min_recall=0.99)
    assert lenient.ok
    assert lenient.recall < 0.999


@pytest.mark.parametrize(
    "mutant",
    [
        mutants.CoarseValuesForK,
        mutants.TruncatesK,
        mutants.NoKScale,
        mutants.KScaleInBf16,
        mutants.PowerOfTwoScaleForK,
        mutants.GatesWithoutQScale,
        mutants.LogitsInBf16,
        mutants.KeysShiftedByOne,
        mutants.NoHadamardOnQ,
        mutants.NoRelu,
    ],
    ids=lambda mutant: mutant.__name__,
)
def test_the_whole_stops_mutants_by_recall(mutant, long_case):
    """Seen from 0.996 (a k scale in bf16) down."""
    case, truth = long_case
    whole = truth.judge(run(mutant(MINI, case.weights, accumulate_bf16_gemm), case).topk, case)
    assert not whole.ok
    assert whole.recall < 0.999


@pytest.mark.parametrize(
    "mutant",
    [mutants.CoarseValuesForK, mutants.NoKScale, mutants.KeysShiftedByOne, mutants.GetsOneKeyWrong],
    ids=lambda mutant: mutant.__name__,
)
def test_the_gap_alone_stops_what_is_not_rounding(mutant, long_case):
    case, truth = long_case
    whole = truth.judge(run(mutant(MINI, case.weights, accumulate_bf16_gemm), case).topk, case, min_recall=0)
    assert not whole.ok
    assert whole.worst_swap_gap > whole.gap_bound


def test_single_scores_lie_within_the_gap(long_case):
    """A swap is the deviation of two scores. Hundreds of thousands of single ones lie well inside what it is allowed."""
    case, truth = long_case
    flow = run(OtherIndexer(MINI, case.weights, accumulate_bf16_gemm), case)
    deviation_TN = (flow.logits.double() - truth.scores_TN).abs() / (truth.gap_T / gates.GAP_DEVIATIONS)[:, None]
    keys = torch.arange(deviation_TN.shape[1])
    visible = (keys >= case.ks_T[:, None]) & (keys < case.ke_T[:, None])
    assert int(visible.sum()) > 100_000
    worst = float(deviation_TN[visible].max())
    assert worst <= gates.GAP_DEVIATIONS
    # The bound is not a void one: some scores do deviate.
    assert worst > 0.05
