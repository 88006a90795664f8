"""A chain of layers: nothing in it can be skipped, reordered or read too early without a trace in its last output."""

from __future__ import annotations

import pytest
import torch

from experiments import catalogue
from experiments.errors import SpecError
from experiments.names import Control, Device, Payload, Scope, Split
from experiments.spec.arms import ArmSpec
from experiments.spec.measurement import VerifySpec
from experiments.spec.simulation import SimulationSpec
from experiments.spec.weights import WeightsSpec
from tests.conftest import BOTH_ARMS, make_cell, make_step
from tests.workers.asking import faults, prepare, run_block, verify
from tests.workers.mutants_of_chain import CHAIN
from workers.chain import carry
from workers.fabrics.transport import CollectiveTransport
from workers.filler import Filler
from workers.indexer.indexer import Shard
from workers.lanes import make_lanes
from workers.messages import PrepareCell, Variant
from workers.prepared_cell import PreparedCell

CONTROLS = ["overlapped/prefilled", "overlapped/zero_byte", "baseline/gather_alone"]


def one_rank(layers: int = CHAIN, filler_us: float = 0.0) -> PreparedCell:
    cell = make_cell(make_step((12, 64)), cp_size=1, layers=layers, filler_us=filler_us)
    request = PrepareCell(cell, BOTH_ARMS, WeightsSpec(), 0, 2, VerifySpec(), SimulationSpec())
    return PreparedCell(request, 0, make_lanes(Device.CPU, SimulationSpec(), 10), CollectiveTransport(None, "lo"))


@pytest.mark.parametrize("split", list(Split))
@pytest.mark.parametrize("scope", list(Scope))
def test_shipped_schedules_agree_bit_for_bit_through_a_chain(pair, split, scope):
    prepare(pair, make_cell(make_step((5, 64), (0, 37)), split=split, scope=scope, layers=CHAIN))
    reports = verify(pair)
    assert [r.faults for r in reports] == [(), ()]
    assert reports[0].key_digests == reports[1].key_digests
    blocks = run_block(pair, ["baseline", "overlapped", *CONTROLS])
    assert [b.faults for b in blocks] == [(), ()]
    assert [r.faults for r in verify(pair, deep=False)] == [(), ()]


@pytest.mark.parametrize("scope", [Scope.KEY_READY, Scope.INDEXER])
def test_packed_keys_are_held_to_a_chain_of_packed_keys(pair, scope):
    arms = {
        "baseline": ArmSpec(),
        "fp8": ArmSpec(payload=Payload.FP8),
        "fp8_overlapped": ArmSpec(payload=Payload.FP8, schedule="overlap_rotate"),
        "fp8_mutant": ArmSpec(payload=Payload.FP8, schedule="tests.workers.mutants_of_chain:stale_keys_in_the_middle"),
    }
    prepare(pair, make_cell(make_step((5, 64), (0, 37)), scope=scope, layers=CHAIN), arms)
    assert {fault.arm for fault in faults(pair)} == {"fp8_mutant"}
    blocks = run_block(
        pair, ["baseline", "fp8", "fp8_overlapped", "fp8/prefilled", "fp8_overlapped/zero_byte", "fp8/gather_alone"]
    )
    assert [b.faults for b in blocks] == [(), ()]


@pytest.mark.parametrize("fabric", ["process_group", "emulated_100mbit"])
def test_filler_and_skew_and_several_steps_change_no_bit(pair, fabric):
    steps = [make_step((0, 40)), make_step((3, 64))]
    prepare(pair, make_cell(*steps, fabric=fabric, layers=CHAIN, filler_us=50, skew_us=300))
    assert faults(pair) == []
    blocks = run_block(pair, ["baseline", "overlapped", *CONTROLS], num_steps=2)
    assert [b.faults for b in blocks] == [(), ()]
    for block in blocks:
        assert all((row.filler_us is None) == row.variant.endswith("gather_alone") for row in block.rows)


@pytest.mark.parametrize(
    ("mutant", "says"),
    [
        ("stale_keys_in_the_middle", "last of 3 layers"),
        ("no_join_in_the_middle", "layer 1: returned without joining"),
        ("joins_a_layer_late", "layer 0: returned without joining"),
        ("reuses_a_buffer_that_is_still_written", "last of 3 layers"),
        ("sends_a_buffer_that_the_next_layer_overwrites", "last of 3 layers"),
        ("starts_layers_early", "last of 3 layers"),
    ],
)
def test_what_is_wrong_between_layers_is_caught_before_and_while_it_is_timed(pair, mutant, says):
    arms = {"baseline": ArmSpec(), "mutant": ArmSpec(schedule=f"tests.workers.mutants_of_chain:{mutant}")}
    prepare(pair, make_cell(make_step((0, 256)), layers=CHAIN), arms)
    found = faults(pair)
    assert {f.arm for f in found} == {"mutant"}
    assert any(says in f.detail for f in found), found
    # A race over a send buffer may be won by luck in a block: that is why every arm runs with its gather held back first.
    for _ in range(40):
        timed = {fault.arm for block in run_block(pair, ["baseline", "mutant"]) for fault in block.faults}
        if timed:
            break
    assert timed == {"mutant"}


@pytest.mark.parametrize("mutant", ["no_join", "joins_too_late", "gathers_before_rotation", "reuses_buffer", "never_rotates_q"])
def test_what_is_wrong_in_every_layer_is_caught_in_a_chain_too(pair, mutant):
    arms = {"baseline": ArmSpec(), "mutant": ArmSpec(schedule=f"tests.workers.mutants:{mutant}")}
    prepare(pair, make_cell(make_step((0, 256)), layers=CHAIN), arms)
    assert {f.arm for f in faults(pair)} == {"mutant"}


def test_layers_differ_and_the_last_depends_on_all_before_it():
    cell = one_rank()
    weights = [layer.weights for layer in cell.layers[cell.settings_of["baseline"]]]
    assert not torch.equal(weights[0].wk, weights[1].wk)
    assert not torch.equal(weights[0].wq_b, weights[2].wq_b)
    keys = cell.correct(0, 0).keys_SD
    assert len(keys) == CHAIN
    assert not torch.equal(keys[0], keys[1])
    outcome = cell.run(Variant("overlapped"), 0, 0, Scope.INDEXER)
    assert torch.equal(outcome.k, keys[-1])
    assert torch.equal(outcome.topk, cell.finish_correct(0, 0))
    assert not torch.equal(cell.finish_correct(0, 0, num_layers=1), cell.finish_correct(0, 0))


def test_the_first_layer_of_a_chain_is_the_drained_cell():
    chain, drained = one_rank(), one_rank(layers=1)
    assert torch.equal(chain.correct(0, 0).keys_SD[0], drained.correct(0, 0).keys_SD[0])


@pytest.mark.parametrize("control", [Control.PREFILLED, Control.ZERO_BYTE])
def test_controls_compute_the_same_chain(control):
    cell = one_rank()
    outcome = cell.run(Variant("overlapped", control), 0, 1, Scope.INDEXER)
    assert cell.problem("overlapped", outcome, 0, 1) is None
    assert torch.equal(outcome.topk, cell.finish_correct(0, 1))


def shard_of(rows: int, seed: int) -> tuple[Shard, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, q_lora = torch.randn(rows, 200, generator=generator).bfloat16(), torch.randn(rows, 72, generator=generator).bfloat16()
    q, k = torch.randn(rows, 4, 128, generator=generator).bfloat16(), torch.randn(2 * rows, 128, generator=generator).bfloat16()
    none = torch.empty(0)
    return Shard(x, q_lora, none, none, none, none), q, k


@pytest.mark.parametrize("row", [0, 7, 15])
def test_one_stale_row_changes_every_tokens_next_inputs(row):
    shard, q, k = shard_of(8, 0)
    stale = k.clone()
    stale[row] = shard_of(8, 1)[2][row]
    right, wrong = carry(shard, q, k), carry(shard, q, stale)
    assert (right.x_TX != wrong.x_TX).any(1).all()
    assert torch.equal(right.q_lora_TR, wrong.q_lora_TR)


def test_inputs_keep_their_size_and_follow_q_token_by_token():
    shard, q, k = shard_of(8, 0)
    other = q.clone()
    other[3] = -other[3]
    right, wrong = carry(shard, q, k), carry(shard, other, k)
    assert torch.equal(right.x_TX.abs(), shard.x_TX.abs())
    assert torch.equal(right.q_lora_TR.abs(), shard.q_lora_TR.abs())
    assert not torch.equal(right.x_TX, shard.x_TX)
    assert (right.q_lora_TR != wrong.q_lora_TR).any(1).tolist() == [row == 3 for row in range(8)]


@pytest.mark.parametrize(("wanted_us", "units"), [(300, 60), (20_000, 4000), (0.1, 1)])
def test_filler_is_calibrated_to_what_was_asked(monkeypatch, wanted_us, units):
    """On a rank where a unit takes 5 us."""
    monkeypatch.setattr(Filler, "_measured_us", lambda filler: 5.0 * filler.units)
    filler = Filler(wanted_us, make_lanes(Device.CPU, SimulationSpec(), 10))
    assert filler.units == units
    before = filler._target.clone()
    filler.run()
    assert filler._product.isfinite().all()
    assert torch.equal(filler._target, torch.zeros_like(before))


def test_a_chain_is_a_coordinate_of_the_cell():
    cells = (
        catalogue.load(
            "quickstart",
            [
                "workload.new_tokens=512",
                "cells.split=zigzag",
                "cells.fabric=process_group",
                "cells.regime=[drained,streaming]",
                "cells.filler_us=[0,300]",
            ],
        )
        .expand()
        .cells
    )
    drained, streaming, filled = cells
    assert drained.cell_id == "ad62b9e95bb3"
    assert [c.layers for c in cells] == [1, 4, 4]
    assert streaming.label == f"{drained.label}-streaming"
    assert filled.label == f"{drained.label}-streaming-filler300us"
    assert len({c.cell_id for c in cells}) == 3
    longer = (
        catalogue.load(
            "quickstart", ["workload.new_tokens=512", "cells.regime=streaming", "chain.layers=8", "cells.fabric=process_group"]
        )
        .expand()
        .cells
    )
    assert longer[0].cell_id != streaming.cell_id
    grown = [cell.bytes_per_rank(3) for cell in (drained, streaming, longer[0])]
    assert (grown[1] - grown[0]) / 3 == (grown[2] - grown[1]) / 4 > 0


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["cells.filler_us=300"], "add streaming to regime"),
        (["cells.filler_us=-1", "cells.regime=streaming"], r"cells\.filler_us"),
        (["chain.layers=1", "cells.regime=streaming"], r"chain\.layers"),
        (["cells.regime=steaming"], "'drained' or 'streaming'"),
    ],
)
def test_a_chain_that_is_none_is_refused(overrides, says):
    with pytest.raises(SpecError, match=says):
        catalogue.load("quickstart", overrides)
