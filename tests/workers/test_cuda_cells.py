"""Every shipped schedule on a GPU, with every payload, set of stages and mover, bit for bit as `serial`, and `serial` as the references.

What differs between cells is covered in pairs; inside a cell every arm runs.

Legend: T rows on this rank, S step tokens, N packed keys, H heads, D head dim, K top-k, R rows of a rank on the wire.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
import torch

from experiments.names import Control, Execution, Payload, Schedule, Scope, Split, Stages
from experiments.spec.arms import ArmSpec
from experiments.spec.fabric import PRESETS as FABRICS
from tests.workers.one_gpu import CHAIN, HAS_CUDA, NIC, NVLINK, VERIFY, made_ready, one_rank_cell, shipped_arms, step_of, wrong_in
from workers.fabrics.process_group import ProcessGroupFabric
from workers.indexer.reference import Reference, topk_rows
from workers.lanes.cuda import CudaLanes
from workers.messages import Variant
from workers.prepared_cell import PreparedCell
from workers.splits import plan
from workers.verify import verify_cell

on_gpu = pytest.mark.skipif(not HAS_CUDA, reason="needs a CUDA device")


class Case(NamedTuple):
    """The coordinates of a cell."""

    split: str
    scope: str
    link: str
    plays: str
    layers: int
    dims: str
    cp_size: int
    shape: str


SHAPES = {
    "one": step_of((0, 1201)),
    "prefix": step_of((3001, 517)),
    "three": step_of((2300, 211), (0, 340), (75, 33)),
    "few": step_of((2100, 17)),
}
"""Odd sizes, so that ranks have unequal shards and pad; prefixes beyond top-k, so that something is left out; one to three rows a rank."""
LEVELS = {
    "split": list(Split),
    "scope": list(Scope),
    "link": [NVLINK, NIC],
    "plays": ["first", "last"],
    "layers": [1, CHAIN],
    "dims": ["deepseek_v32", "glm_5"],
    "cp_size": [2, 4, 8],
    "shape": list(SHAPES),
}
CASES = [
    Case("interleave", "indexer", NVLINK, "first", 1, "deepseek_v32", 4, "one"),
    Case("interleave", "indexer", NVLINK, "last", 1, "deepseek_v32", 8, "three"),
    Case("interleave", "indexer", NIC, "first", CHAIN, "deepseek_v32", 2, "few"),
    Case("interleave", "key_ready", NVLINK, "first", 1, "deepseek_v32", 4, "prefix"),
    Case("interleave", "key_ready", NIC, "first", 1, "deepseek_v32", 2, "one"),
    Case("interleave", "qk", NVLINK, "first", 1, "glm_5", 2, "three"),
    Case("interleave", "qk", NIC, "first", CHAIN, "deepseek_v32", 8, "one"),
    Case("zigzag", "indexer", NIC, "last", 1, "glm_5", 2, "prefix"),
    Case("zigzag", "key_ready", NVLINK, "first", 1, "glm_5", 8, "few"),
    Case("zigzag", "key_ready", NIC, "last", CHAIN, "glm_5", 4, "three"),
    Case("zigzag", "qk", NVLINK, "last", 1, "glm_5", 8, "one"),
    Case("zigzag", "qk", NVLINK, "last", CHAIN, "deepseek_v32", 4, "few"),
    Case("zigzag", "qk", NIC, "first", CHAIN, "glm_5", 8, "prefix"),
]


def test_every_pair_of_coordinates_has_a_cell():
    wanted = {((a, x), (b, y)) for a, b in itertools.combinations(LEVELS, 2) for x in LEVELS[a] for y in LEVELS[b]}
    have = {pair for case in CASES for pair in itertools.combinations(case._asdict().items(), 2)}
    assert wanted <= have


def arms_of(number: int, layers: int) -> dict[str, ArmSpec]:
    """All shipped ones, two of them as CUDA graphs as well, another two in every cell; and one that leaves SMs to the gather."""
    schedules, stages = list(Schedule), list(Stages)
    graphs = {
        f"graph_{kind}": ArmSpec(schedule=schedules[(number + turn) % 5], stages=kind, execution=Execution.CUDA_GRAPH)
        for turn, kind in enumerate(stages)
    }
    spare = {"sms": ArmSpec(schedule=Schedule.OVERLAP_QUERY, reserved_sms=16)} if number % 4 == 0 else {}
    return {**shipped_arms(layers), **graphs, **spare}


def check_at_its_own_scope(cell: PreparedCell) -> None:
    """Every arm and its controls as they are timed."""
    scope = cell.cell.scope
    for arm, spec in cell.arms.items():
        if scope is Scope.QK and spec.payload is Payload.FP8:
            continue
        for control in Control:
            if control is Control.NONE or spec.execution is Execution.EAGER:
                assert wrong_in(cell, Variant(arm, control), cell.next_input(), scope) == [], (arm, control)


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda number: "-".join(map(str, CASES[number])))
def test_shipped_arms_have_the_bits_of_serial_and_serial_is_right(number):
    case = CASES[number]
    cell = one_rank_cell(
        SHAPES[case.shape],
        split=Split(case.split),
        cp_size=case.cp_size,
        link=case.link,
        plays=case.plays,
        scope=Scope(case.scope),
        layers=case.layers,
        dims=case.dims,
    )
    arms = arms_of(number, case.layers)
    with made_ready(cell, arms) as ready:
        report = verify_cell(ready, VERIFY, 0, deep=True)
        assert report.faults == ()
        assert report.num_checks > 3 * 4 * len(arms)
        assert report.recall is not None and report.recall >= 0.999
        check_at_its_own_scope(ready)


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("split", list(Split))
def test_first_and_last_rank_hold_the_same_index_keys(split):
    digests = []
    for plays, link in (("first", NVLINK), ("last", NVLINK), ("last", NIC)):
        cell = one_rank_cell(step_of((300, 511), (0, 77)), split=split, plays=plays, link=link)
        with made_ready(cell, {"baseline": ArmSpec()}) as ready:
            digests.append(verify_cell(ready, VERIFY, 0, deep=False).key_digests)
    assert digests[0] == digests[1] == digests[2]
    assert len(set(digests[0])) == len(digests[0]), "no two input sets have the same keys"


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("layers", [1, CHAIN])
def test_a_replay_with_steps_that_are_not_split(layers):
    """Zigzag takes no step whose sequences are shorter than 2 x cp_size: it runs whole on every rank, and nothing is gathered."""
    steps = step_of((700, 9)), step_of((0, 203), (64, 16)), step_of((0, 300), (40, 15))
    cell = one_rank_cell(*steps, cp_size=8, layers=layers)
    with made_ready(cell, shipped_arms(layers)) as ready:
        assert [step.plan.is_split for step in ready.steps] == [False, True, False]
        assert verify_cell(ready, VERIFY, 0, deep=True).faults == ()


@on_gpu
@pytest.mark.gpu
def test_skew_filler_and_planted_waits_change_no_bit():
    cell = one_rank_cell(step_of((0, 401)), plays="last", layers=CHAIN, skew_us=200.0, filler_us=60.0)
    waits = {
        name: arm.model_copy(update={"planted_wait_us": 40.0}) for name, arm in shipped_arms(CHAIN).items() if name != "baseline"
    }
    with made_ready(cell, {"baseline": ArmSpec(), **waits}) as ready:
        assert verify_cell(ready, VERIFY, 0, deep=True).faults == ()


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("payload", list(Payload))
def test_one_bit_of_one_peers_row_shows_in_every_arm(payload):
    """That what is compared is what came off the wire."""
    arms = {name: arm for name, arm in shipped_arms().items() if arm.payload is payload or name == "baseline"}
    with made_ready(one_rank_cell(step_of((0, 333)), plays="first"), arms) as ready:
        assert verify_cell(ready, VERIFY, 0, deep=False).faults == ()
        for settings in ready.all_settings:
            # The row before the last on the wire is a token's; the last may be padding.
            ready.correct(0, 0, settings).wire[payload][0][-2].view(torch.uint8)[77] ^= 1
        for name, arm in arms.items():
            wrong = wrong_in(ready, Variant(name), 0)
            assert any("k of step" in problem for problem in wrong) == (arm.payload is payload), name


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dims", ["deepseek_v32", "glm_5", "mini"])
@pytest.mark.parametrize("split", list(Split))
def test_selections_of_integers_are_exact(dims, split):
    """Sums of small integers have no rounding: the scores of the selected keys are R2's, and so is the order, ties and all; rows in chunks."""
    verify = VERIFY.model_copy(update={"logits_mib": 1})
    cell = one_rank_cell(step_of((2300, 411), (0, 533)), split=split, dims=dims)
    with made_ready(cell, {"baseline": ArmSpec()}, verify=verify) as ready:
        step, layer, g = ready.steps[0], ready.layers[ready.all_settings[0]][0], torch.Generator("cuda").manual_seed(3)
        assert len(step.logits) > 1

        def integers(largest: int, *shape: int) -> torch.Tensor:
            return torch.randint(-largest, largest + 1, shape, generator=g, device="cuda").float()

        heads, topk, keys = ready.cell.dims.num_heads, ready.cell.dims.topk, ready.cell.steps[0].kv_tokens
        q8_THD = integers(4, step.plan.local_tokens, heads, 128).to(torch.float8_e4m3fn)
        k8_ND, scale_N = integers(4, keys, 128).to(torch.float8_e4m3fn), 1 + integers(1, keys).abs()
        gates_TH = integers(3, step.plan.local_tokens, heads)
        got_TK = layer.ops.select(q8_THD, k8_ND, scale_N, gates_TH, step.ks_T, step.ke_T, topk, step.logits).cpu()
        r2 = Reference(ready.cell.dims, ready.weights, rounding=True)
        scores_TN = r2.logits(q8_THD.cpu(), k8_ND.cpu(), scale_N.cpu(), gates_TH.cpu())
    ks_T, ke_T = step.ks_T.cpu(), step.ke_T.cpu()
    wanted_TK = topk_rows(scores_TN, ks_T, ke_T, topk)

    def scores_of(positions_TK: torch.Tensor) -> torch.Tensor:
        """In order; -inf where nothing is selected."""
        columns_TK = (ks_T[:, None] + positions_TK).clamp(0, keys - 1).long()
        return scores_TN.gather(1, columns_TK).masked_fill(positions_TK < 0, -torch.inf).sort(1, descending=True).values

    assert torch.equal(scores_of(got_TK), scores_of(wanted_TK))
    assert torch.equal(got_TK.long(), wanted_TK)
    ties = scores_of(wanted_TK).diff(dim=1) == 0
    assert bool(ties.any(1).float().mean() > 0.5), "ties were put in order"


class PlayedTransport:
    """An all-gather whose other ranks' rows are known."""

    path = "played"

    def __init__(self, wire_RB: torch.Tensor, rank: int) -> None:
        """uint8 [c, bytes of a rank]."""
        self.wire_RB, self.rank = wire_RB, rank

    def all_gather(self, out: torch.Tensor, local: torch.Tensor, beside_compute: bool = False) -> None:
        assert torch.equal(local, self.wire_RB[self.rank]), "what the rank brings, and zeros behind it"
        out.copy_(self.wire_RB.view(-1))


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("payload", list(Payload))
@pytest.mark.parametrize("split", list(Split))
def test_a_process_group_fabric_puts_all_ranks_rows_in_token_order(split, payload):
    """Every rank of every size in turn, on the side lane; one fabric's buffers serve shapes that alternate."""
    lanes, cp_size = CudaLanes(20.0), 4
    g = torch.Generator("cuda").manual_seed(5)
    try:
        for rank in range(cp_size):
            fabric = ProcessGroupFabric(FABRICS["process_group"], None, lanes)
            for step in (step_of((0, 97)), step_of((3, 8), (0, 21)), step_of((0, 97))):
                mine = plan(split, step, cp_size, rank)
                tokens_SB = torch.randint(
                    0, 256, (step.new_tokens, 132 if payload is Payload.FP8 else 256), generator=g, device="cuda"
                )
                tokens_SB = tokens_SB.to(torch.uint8)
                wire = torch.zeros(cp_size, mine.max_rows, tokens_SB.shape[1], dtype=torch.uint8, device="cuda")
                rows = [plan(split, step, cp_size, other).local_rows_T.cuda() for other in range(cp_size)]
                for other, rows_T in enumerate(rows):
                    wire[other, : len(rows_T)] = tokens_SB[rows_T]
                fabric.transport = PlayedTransport(wire.view(cp_size, -1), rank)
                dtype = torch.uint8 if payload is Payload.FP8 else torch.bfloat16
                out = torch.full_like(tokens_SB, 0x7F).view(dtype)
                local = tokens_SB[rows[rank]].view(dtype)
                lanes.fork(lambda f=fabric, p=mine, k=local, o=out: f.gather(p, k, o)).join()
                assert torch.equal(out.view(torch.uint8), tokens_SB)
    finally:
        lanes.close()
