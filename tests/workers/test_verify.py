"""The checks that all arms share catch what all arms would get wrong alike."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from experiments.names import Device, Scope, Split
from experiments.spec.arms import ArmSpec
from experiments.spec.measurement import VerifySpec
from experiments.spec.simulation import SimulationSpec
from experiments.spec.weights import WeightsSpec
from tests.conftest import BOTH_ARMS, MINI, make_cell, make_step
from tests.workers.asking import prepare, verify
from workers import prepared_step
from workers.fabrics.transport import CollectiveTransport
from workers.indexer import ops, stages
from workers.indexer.ops import TorchOps
from workers.lanes import make_lanes
from workers.messages import PrepareCell
from workers.prepared_cell import PreparedCell
from workers.verify import sampled_steps, verify_cell


def one_rank(cell) -> PreparedCell:
    """The whole of a cell of cp_size 1, in this process."""
    request = PrepareCell(cell, BOTH_ARMS, WeightsSpec(), 0, 2, VerifySpec(delay_ms=1), SimulationSpec())
    lanes = make_lanes(Device.CPU, SimulationSpec(), 10)
    return PreparedCell(request, 0, lanes, CollectiveTransport(None, "lo"))


def report(cell: PreparedCell):
    return verify_cell(cell, VerifySpec(delay_ms=1), 0, deep=True)


SHAPE = make_step((40, 150), (0, 90))


def test_a_right_cell_passes_every_gate():
    found = report(one_rank(make_cell(SHAPE, cp_size=1)))
    assert found.faults == ()
    assert {g[0].split(".")[0] for g in found.gates} >= {"rope", "hadamard", "head_gates", "logits", "gathered keys", "topk"}
    assert all(worst <= bound for _, worst, bound in found.gates)


@pytest.mark.parametrize("split", list(Split))
def test_recall_on_random_inputs(pair, split):
    prepare(pair, make_cell(make_step((300, 1200)), split=split, dims=MINI), verify=VerifySpec(rows_per_rank=64))
    for rank in verify(pair):
        assert rank.faults == ()
        assert rank.recall >= 0.999
        assert rank.recall_unrounded > 0.9


def off_by_one_ke(by):
    def ranges(step):
        right = prepared_step_ranges(step)
        return replace(right, ke_S=right.ke_S + by)

    return ranges


prepared_step_ranges = prepared_step.causal_ranges


@pytest.mark.parametrize("by", [-1, 1])
def test_an_off_by_one_in_ke_is_caught(monkeypatch, by):
    monkeypatch.setattr(prepared_step, "causal_ranges", off_by_one_ke(by))
    found = report(one_rank(make_cell(make_step((0, 50)), cp_size=1)))
    assert any(f.check == "top-k" for f in found.faults)


def test_interleaved_rope_is_caught(monkeypatch):
    right = ops.apply_rope

    def wrong(x, cos, sin, dims):
        return right(x, cos, sin, dims.model_copy(update={"rope_style": "interleaved"}))

    monkeypatch.setattr(ops, "apply_rope", wrong)
    monkeypatch.setattr(TorchOps, "rope_one", staticmethod(wrong))
    found = report(one_rank(make_cell(SHAPE, cp_size=1)))
    assert {"R2 rope.q", "R2 rope.k", "R2 gathered keys"} <= {f.check for f in found.faults}


def quantise_q_as_k(q):
    """k's rule on q: the asymmetry is part of the data flow."""
    scale = q.float().abs().amax(-1).clamp_min(1e-4) / 448
    return (q.float() / scale[..., None]).to(torch.float8_e4m3fn), scale


@pytest.mark.parametrize(
    ("stage", "wrong", "check"),
    [
        ("quantise_q", quantise_q_as_k, "R2 quantise_q"),
        ("quantise_k", lambda k: (k.to(torch.float8_e4m3fn), torch.ones(len(k))), "R2 quantise_k"),
        ("hadamard", lambda x: x, "R2 hadamard"),
        ("norm_k", lambda k, w, b: (k * w).to(k.dtype), "R2 norm_k"),
        ("head_gates", lambda x, w, s, d: x.float() @ w.float().T * w.shape[0] ** -0.5 * d**-0.5, "R2 head_gates"),
    ],
)
def test_a_wrong_stage_is_caught_and_named(monkeypatch, stage, wrong, check):
    monkeypatch.setattr(stages, stage, wrong)
    monkeypatch.setattr(TorchOps, stage, staticmethod(wrong))
    found = report(one_rank(make_cell(SHAPE, cp_size=1)))
    assert any(f.check.startswith(check) for f in found.faults), found.faults


def test_the_plan_of_another_rank_is_caught(pair):
    """Both ranks swap plans: every row is right for somebody, and the gathered order is wrong."""
    prepare(pair, make_cell(make_step((0, 101)), split=Split.ZIGZAG), {"baseline": ArmSpec(), "x": ArmSpec()})
    assert all(r.faults == () for r in verify(pair))
    wrong = make_cell(make_step((0, 101)), split=Split.ZIGZAG)
    import os

    from service.run.local_ranks import local_group

    group = local_group(2)
    try:
        group.launch(60, 20, Device.CPU, [os.getcwd()])
        prepare(
            group, wrong, {"baseline": ArmSpec(), "x": ArmSpec(schedule="tests.workers.mutants_of_ranks:plan_of_another_rank")}
        )
        assert any("gathered keys" in f.check for r in verify(group) for f in r.faults)
    finally:
        group.close()


def test_simulated_cells_check_contracts_only(pair):
    prepare(pair, make_cell(device=Device.SIMULATED, scope=Scope.INDEXER))
    assert all(r.faults == () and r.key_digests == () and r.num_checks for r in verify(pair))


def test_replays_are_checked_on_a_sample_of_steps(pair):
    assert sampled_steps(3) == [0, 1, 2]
    assert sampled_steps(100)[0] == 0
    assert sampled_steps(100)[-1] == 99
    assert len(sampled_steps(100)) == 6
    steps = [make_step((0, 20 + i)) for i in range(9)] + [make_step((0, 1))]
    prepare(pair, make_cell(*steps, split=Split.ZIGZAG))
    assert all(r.faults == () for r in verify(pair))
