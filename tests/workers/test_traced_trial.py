"""A trace shows what ran: planted times on simulated lanes, real threads on gloo ranks, and the same bits as any other trial."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from experiments.names import Device, Lane, Part, Scope
from experiments.spec.arms import ArmSpec
from experiments.spec.measurement import VerifySpec
from experiments.spec.simulation import SimulationSpec
from experiments.spec.weights import WeightsSpec
from service.report.timeline import crossings
from service.run.rank_group import RankGroup
from tests.conftest import BOTH_ARMS, MINI, make_cell, make_step
from tests.workers.asking import prepare
from workers.fabrics.transport import CollectiveTransport
from workers.lanes import make_lanes
from workers.messages import ArmTrace, PrepareCell, TraceCell, TraceReport, Variant
from workers.prepared_cell import PreparedCell
from workers.timeline import Span, Timeline
from workers.traced_trial import run_traced, trace_arms

ARMS = tuple(BOTH_ARMS)
PLANTED = SimulationSpec(main_slowdown=0.0, fork_us=2.0, join_us=0.5)


def one_rank(device: Device, scope: Scope = Scope.QK, simulation: SimulationSpec = PLANTED, arms=BOTH_ARMS) -> PreparedCell:
    cell = make_cell(make_step((0, 64)), cp_size=1, device=device, scope=scope)
    request = PrepareCell(cell, arms, WeightsSpec(), 0, 3, VerifySpec(), simulation)
    return PreparedCell(request, 0, make_lanes(device, simulation, 10), CollectiveTransport(None, "lo"))


def spans_of(trace: ArmTrace) -> dict[str, Span]:
    spans = {span.stage: span for span in trace.spans}
    assert len(spans) == len(trace.spans), "a stage is there twice"
    return spans


def overlap_ns(one: Span, other: Span) -> int:
    return max(0, min(one.end_ns, other.end_ns) - max(one.start_ns, other.start_ns))


def simulated(scope: Scope = Scope.QK, simulation: SimulationSpec = PLANTED) -> dict[str, ArmTrace]:
    report = trace_arms(one_rank(Device.SIMULATED, scope, simulation), TraceCell(ARMS, 0, True))
    assert report.faults == ()
    return {trace.arm: trace for trace in report.arms}


@pytest.mark.parametrize("arm", ARMS)
def test_simulated_spans_are_the_planted_times(arm):
    for stage, span in spans_of(simulated()[arm]).items():
        planted_us = {Part.FORK: 2.0, Part.WIRE: PLANTED.gather_us, Part.JOIN: PLANTED.gather_us - PLANTED.rotate_q_us + 0.5}
        assert span.end_ns - span.start_ns == 1000 * planted_us.get(stage, getattr(PLANTED, f"{stage}_us", -1))


def test_simulated_lanes_overlap_as_the_schedule_says():
    traces = simulated()
    baseline, overlapped = spans_of(traces["baseline"]), spans_of(traces["overlapped"])
    assert {span.lane for span in baseline.values()} == {Lane.MAIN}
    assert overlap_ns(baseline["gather"], baseline["rotate_q"]) == 0
    assert {stage for stage, span in overlapped.items() if span.lane is Lane.SIDE} == {"gather", Part.WIRE}
    assert overlap_ns(overlapped["gather"], overlapped["rotate_q"]) == 1000 * PLANTED.rotate_q_us
    assert overlapped["gather"].start_ns == overlapped[Part.FORK].end_ns == overlapped["rotate_q"].start_ns
    assert overlapped[Part.JOIN].end_ns == overlapped["gather"].end_ns + 500 == traces["overlapped"].end_ns
    total_us = {arm: (trace.end_ns - trace.start_ns) / 1000 for arm, trace in traces.items()}
    assert total_us["baseline"] - total_us["overlapped"] == PLANTED.rotate_q_us - 2.5


def test_a_slowed_main_lane_shows_its_slowness():
    overlapped = spans_of(simulated(simulation=PLANTED.model_copy(update={"main_slowdown": 0.25}))["overlapped"])
    assert overlapped["rotate_q"].end_ns - overlapped["rotate_q"].start_ns == 1250 * PLANTED.rotate_q_us


def test_a_longer_scope_shows_its_stages():
    stages = Counter(span.stage for span in simulated(Scope.INDEXER)["overlapped"].spans)
    assert stages["quantise"] == 2
    assert stages["head_gates"] == stages["logits"] == 1


@pytest.mark.parametrize("arm", ARMS)
def test_a_traced_trial_has_the_bits_of_any_other(arm):
    cell = one_rank(Device.CPU, Scope.INDEXER)
    untraced = cell.run(Variant(arm), 0, 1, Scope.INDEXER)
    q, k, topk = untraced.q.clone(), untraced.k.clone(), untraced.topk.clone()
    timeline = Timeline(0)
    lanes, layers, fabric = cell.lanes, cell.layers, cell.fabric
    traced = run_traced(cell, arm, 0, 1, timeline)
    assert traced.digests == untraced.digests
    assert traced.q.equal(q)
    assert traced.k.equal(k)
    assert traced.topk.equal(topk)
    assert cell.problem(arm, traced, 0, 1) is None
    assert (cell.lanes, cell.layers, cell.fabric) == (lanes, layers, fabric)
    assert all(layer.lanes is lanes for same in layers.values() for layer in same)
    num_spans = len(timeline.spans)
    cell.run(Variant(arm), 0, 1, Scope.INDEXER)
    assert len(timeline.spans) == num_spans > 0, "a trial that is not traced writes nothing"


def trace(group: RankGroup, shares_clock: bool = True) -> list[TraceReport]:
    return [report for report in group.ask(TraceCell(ARMS, 0, shares_clock), 60) if isinstance(report, TraceReport)]


STAGES = {"wq_b", "wk", "norm_k", "rope", "rotate_q", "rotate_k", "gather", Part.PAD, Part.WIRE, Part.RERANGE}


@pytest.fixture(scope="module")
def prepared(pair):
    """A wire of 200 ms and more under a rotation of milliseconds: the gather has started long before that ends, whatever the load."""
    cell = make_cell(make_step((0, 1024)), fabric="emulated_20mbit", dims=MINI)
    prepare(pair, cell)
    return pair


@pytest.fixture(scope="module")
def reports(prepared) -> list[TraceReport]:
    return trace(prepared)


def test_every_stage_is_there_once_on_every_rank(reports):
    assert [report.rank for report in reports] == [0, 1]
    for report in reports:
        assert (report.offset_ns, report.uncertainty_ns, report.faults) == (0, 0, ())
        assert [trace.arm for trace in report.arms] == list(ARMS)
        assert set(spans_of(report.arms[0])) == STAGES
        assert set(spans_of(report.arms[1])) == STAGES | {Part.FORK, Part.JOIN}
        assert all(span.rank == report.rank for trace in report.arms for span in trace.spans)


def test_spans_lie_in_their_trial_and_parts_in_their_gather(reports):
    for trace in (trace for report in reports for trace in report.arms):
        spans = spans_of(trace)
        assert all(trace.start_ns <= span.start_ns <= span.end_ns <= trace.end_ns for span in trace.spans)
        parts = [spans[part] for part in (Part.PAD, Part.WIRE, Part.RERANGE)]
        edges = [spans["gather"].start_ns, *(ns for part in parts for ns in (part.start_ns, part.end_ns)), spans["gather"].end_ns]
        assert edges == sorted(edges)
        for lane in Lane:
            whole = [span for span in trace.spans if span.lane is lane and span not in parts]
            assert all(one.end_ns <= other.start_ns for one, other in itertools.pairwise(whole)), "a lane does one thing"


def test_the_gather_runs_beside_the_rotation_in_the_overlapped_arm_alone(reports):
    for report in reports:
        baseline, overlapped = (spans_of(trace) for trace in report.arms)
        assert baseline["gather"].lane is Lane.MAIN
        assert overlap_ns(baseline["gather"], baseline["rotate_q"]) == 0
        assert overlapped["gather"].lane is Lane.SIDE
        assert overlapped["rotate_q"].lane is Lane.MAIN
        assert overlap_ns(overlapped["gather"], overlapped["rotate_q"]) > 0


def test_no_wire_ends_before_the_last_rank_arrives(reports):
    """Spans of different ranks are on one clock: the emulated link orders them."""
    for arms in zip(*(report.arms for report in reports), strict=True):
        last_ns = max(spans_of(trace)["gather"].start_ns for trace in arms)
        assert all(spans_of(trace)[Part.WIRE].end_ns > last_ns for trace in arms)


def test_ranks_that_share_no_clock_are_put_on_that_of_rank_0(prepared):
    """These ranks do share one, so the true offset is 0, and the bound is a bound."""
    first, second = trace(prepared, shares_clock=False)
    assert (first.offset_ns, first.uncertainty_ns) == (0, 0)
    assert second.uncertainty_ns > 0
    assert abs(second.offset_ns) <= second.uncertainty_ns
    assert second.faults == ()


def test_simulated_ranks_are_traced_too(pair):
    prepare(pair, make_cell(make_step((0, 64)), device=Device.SIMULATED), simulation=PLANTED)
    for report in trace(pair):
        for arm in report.arms:
            spans = spans_of(arm)
            assert spans["gather"].end_ns - spans["gather"].start_ns == 1000 * PLANTED.gather_us
            assert (overlap_ns(spans["gather"], spans["rotate_q"]) > 0) is (arm.arm == "overlapped")


def test_work_that_a_schedule_forks_itself_is_on_the_side_lane():
    arms = {"baseline": BOTH_ARMS["baseline"], "mine": ArmSpec(schedule="tests.workers.mutants:forks_its_own")}
    cell = one_rank(Device.CPU, arms=arms)
    report = trace_arms(cell, TraceCell(("mine",), 0, True))
    assert report.faults == ()
    lanes = {span.stage: span.lane for span in report.arms[0].spans}
    assert (lanes["rotate_k"], lanes["gather"], lanes["rotate_q"]) == (Lane.SIDE, Lane.SIDE, Lane.MAIN)
    ((fork, gather, join),) = crossings(report.arms[0])
    forks = [span for span in report.arms[0].spans if span.stage == Part.FORK]
    assert len(forks) == 2
    assert fork == forks[1]
    assert gather.stage == "gather"
    assert join.end_ns >= gather.end_ns
