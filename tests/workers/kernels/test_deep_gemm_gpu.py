"""DeepGEMM's logits as a stage: to the same bounds as ours, on the stream they are asked for on, and in whole cells bit for bit as their `serial`.

Legend: T query rows, N packed keys, H heads, D head dim, K top-k.
"""

from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("checked on a Hopper GPU", allow_module_level=True)
pytest.importorskip("deep_gemm", reason="the package deep_gemm is not installed", exc_type=ImportError)

from experiments.names import Control, Execution, Logits, Payload, Schedule, Scope, Split, Stages
from experiments.spec.arms import ArmSpec
from tests.workers.kernels.test_logits_gpu import HEADS, SIZES, generator, integers, normals, ranges, reference, visible
from tests.workers.one_gpu import CHAIN, NIC, NVLINK, VERIFY, made_ready, one_rank_cell, step_of, wrong_in
from workers.indexer.stages import row_ranges
from workers.kernels.deep_gemm import deep_gemm_logits
from workers.kernels.nvrtc import count_sms
from workers.kernels.ops import FP8_SLACK, DeepGemmOps
from workers.kernels.topk import topk_positions
from workers.messages import Variant
from workers.verify import verify_cell

pytestmark = pytest.mark.gpu

ALL_SMS = count_sms(torch.cuda.current_device())


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(("rows", "keys"), SIZES)
@pytest.mark.parametrize("is_causal", [True, False])
def test_integers_are_exact(rows, keys, heads, is_causal):
    inputs, ends = integers(rows, keys, heads), torch.stack(ranges(rows, keys, is_causal=is_causal))
    ks, ke = ends.amin(0), ends.amax(0)  # never ks > ke, which it does not take
    seen = visible(ks, ke, keys)
    exact = reference(*inputs)[0]
    for is_clean in (False, True):
        out = deep_gemm_logits(*inputs, ks, ke, ALL_SMS, is_clean)
        assert torch.equal(out.double()[seen], exact[seen])
    assert bool((out[~seen] == float("-inf")).all())


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(("rows", "keys"), SIZES)
def test_random_logits_keep_to_the_slack_of_ours(rows, keys, heads):
    inputs, (ks, ke) = normals(rows, keys, heads), ranges(rows, keys, is_causal=True)
    exact, magnitude = reference(*inputs)
    seen = visible(ks, ke, keys)
    off = (deep_gemm_logits(*inputs, ks, ke, ALL_SMS, False).double() - exact).abs()[seen]
    assert bool((off <= FP8_SLACK * magnitude[seen]).all())


def test_a_row_keeps_its_bits_in_other_company_and_on_fewer_sms():
    """Else no split, chunk or SM budget could be held to another's bits."""
    rows, keys = 70, 900
    q, k, k_scale, gates = normals(rows, keys, 64)
    ks, ke = torch.zeros(rows, dtype=torch.int32, device="cuda"), torch.full((rows,), keys, dtype=torch.int32, device="cuda")
    whole = deep_gemm_logits(q, k, k_scale, gates, ks, ke, ALL_SMS, False)
    order = torch.randperm(rows, generator=generator(3), device="cuda")[:37]
    some = q.view(torch.uint8)[order].view(q.dtype), k, k_scale, gates[order], ks[order], ke[order]
    assert torch.equal(deep_gemm_logits(*some, ALL_SMS - 16, False), whole[order])


def test_the_launch_keeps_to_the_stream_it_is_made_on():
    """Keys that a delayed copy on the same stream brings are the ones that count."""
    q, k, k_scale, gates = normals(64, 1000, 64)
    ks, ke = ranges(64, 1000, is_causal=True)
    right = deep_gemm_logits(q, k, k_scale, gates, ks, ke, ALL_SMS, True).clone()
    late, stream = torch.zeros_like(k), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        late.view(torch.uint8).copy_(k.view(torch.uint8))
        got = deep_gemm_logits(q, late, k_scale, gates, ks, ke, ALL_SMS, True)
    torch.cuda.synchronize()
    assert torch.equal(got, right)


def test_chunks_select_what_the_whole_selects():
    rows = keys = 777
    inputs, (ks, ke) = normals(rows, keys, 64), ranges(rows, keys, is_causal=True)
    ops = DeepGemmOps(0, torch.device("cuda", torch.cuda.current_device()))
    whole = topk_positions(ops.mqa_logits(*inputs, ks, ke), ks, ke, 64)
    for mib in (1, 64):
        chunks = row_ranges(ke.cpu(), keys, ops.bytes_per_logit(64), mib)
        assert torch.equal(ops.select(*inputs, ks, ke, 64, chunks), whole)
    some = row_ranges(ke[:500].cpu(), keys, ops.bytes_per_logit(64), 1)
    assert bool((ops.select(*inputs, ks, ke, 64, some)[500:] == -1).all())


CASES = [
    (Split.ZIGZAG, Scope.INDEXER, NVLINK, "first", 1, "deepseek_v32", 8, step_of((3001, 517))),
    (Split.INTERLEAVE, Scope.INDEXER, NIC, "last", 1, "glm_5", 4, step_of((2300, 211), (0, 340), (75, 33))),
    (Split.ZIGZAG, Scope.INDEXER, NVLINK, "last", CHAIN, "deepseek_v32", 2, step_of((0, 1201))),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[4]}-{case[5]}")
def test_whole_cells_have_the_bits_of_their_serial(case):
    split, scope, link, plays, layers, dims, cp_size, step = case
    cell = one_rank_cell(step, split=split, scope=scope, link=link, plays=plays, layers=layers, dims=dims, cp_size=cp_size)
    theirs = {"logits": Logits.DEEPGEMM}
    arms = {
        "baseline": ArmSpec(),
        **{
            f"{schedule}_{stages}": ArmSpec(schedule=schedule, stages=stages, **theirs)
            for schedule in Schedule
            for stages in Stages
        },
        "sms": ArmSpec(schedule=Schedule.OVERLAP_QUERY, reserved_sms=16, **theirs),
        "graph": ArmSpec(schedule=Schedule.OVERLAP_ROTATE, execution=Execution.CUDA_GRAPH, **theirs),
    }
    if layers == 1:
        arms["fp8"] = ArmSpec(schedule=Schedule.OVERLAP_ROTATE, payload=Payload.FP8, **theirs)
    with made_ready(cell, arms) as ready:
        report = verify_cell(ready, VERIFY, 0, deep=True)
        assert report.faults == ()
        assert report.recall is not None and report.recall >= 0.999
        for arm in arms:
            assert wrong_in(ready, Variant(arm, Control.NONE), ready.next_input(), scope) == [], arm
