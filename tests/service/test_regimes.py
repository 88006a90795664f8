"""How times are reduced over ranks in each regime, and what follows from it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from experiments import catalogue
from experiments.names import Regime, Verdict
from service.judge.interval import Interval
from service.judge.judging import judge_sweep
from service.judge.results import CellRecord
from service.judge.samples import launch_time_us, reduce_trials
from service.report.caveats import caveats
from service.run.preview import preview
from service.store.judged import load_result
from service.store.planned_run import plan_runs
from tests.service.planted import trials
from tests.service.synthetic import home_in, make_spec, make_sweep


def three_ranks(variant, times):
    """Trials of one variant, one a row, with these times of the ranks."""
    blank = trials({variant: 1.0}, launches=1, blocks=1, rows=len(times), ranks=3)
    return [replace(trial, elapsed_us=ranks) for trial, ranks in zip(blank, times, strict=True)]


@pytest.mark.parametrize(
    ("variant", "regime", "expected"),
    [
        ("arm", Regime.DRAINED, 90),
        ("arm", Regime.STREAMING, 50),
        ("arm/gather_alone", Regime.STREAMING, 50),
        ("arm/prefilled", Regime.STREAMING, 90),
        ("arm/zero_byte", Regime.STREAMING, 90),
        ("arm/prefilled", Regime.DRAINED, 90),
    ],
)
def test_a_sample_is_the_slowest_rank_and_in_a_coupled_chain_the_median_one(variant, regime, expected):
    sample = reduce_trials(three_ranks(variant, [(50, 10, 90)]), regime)[0]
    assert sample.time_us == expected
    assert (sample.max_us, sample.min_us) == (90, 10)


def test_a_launch_of_chains_is_the_median_rank_of_median_periods():
    """Ranks (10, 20, 30) have periods of their own; in each trial another one is preempted."""
    times = [(10, 20, 99), (10, 99, 30), (99, 20, 30)]
    assert launch_time_us(reduce_trials(three_ranks("arm", times), Regime.STREAMING), Regime.STREAMING) == 20
    assert launch_time_us(reduce_trials(three_ranks("arm/prefilled", times), Regime.STREAMING), Regime.STREAMING) == 30
    assert launch_time_us(reduce_trials(three_ranks("arm", times)), Regime.DRAINED) == 99


def record_of(spec, found):
    cell = spec.expand().cells[0]
    return CellRecord(cell.as_json(), found, (), "", {}, "planted", None)


@pytest.mark.parametrize(("enqueue_us", "expected"), [(None, None), (60.0, False), (94.0, False), (96.0, True), (130.0, True)])
def test_host_bound_is_enqueuing_to_the_end_of_the_trial(enqueue_us, expected):
    spec = make_spec()
    found = trials({"baseline": 100.0, "overlapped": 100.0}, enqueue_us=enqueue_us)
    judged = judge_sweep([record_of(spec, found)], spec)
    assert {arm.host_bound for arm in judged.cells[0].arms} == {expected}


def streaming_spec(**cells):
    return make_spec(
        cells={"cp_size": 2, "split": "zigzag", "fabric": ["process_group", "emulated_20mbit"], "regime": "streaming", **cells}
    )


def test_the_account_of_a_streaming_sweep_adds_up_with_intervals(tmp_path):
    records, result = make_sweep(home_in(tmp_path), streaming_spec())
    for cell in result.cells:
        account = next(arm.account for arm in cell.arms if arm.arm == "overlapped")
        total = account.ideal_us.estimate + account.fork_join_tax_us.estimate + account.contention_us.estimate
        assert total == pytest.approx(account.total_us.estimate)
        assert account.gather_us.low <= 200 <= account.gather_us.high
        assert account.hidden is not None
        assert account.hidden.low <= 0.75 <= account.hidden.high
    assert any("mean of a chain of 4 without a barrier" in line for line in caveats(result))
    records.close()


def test_a_layer_with_filler_has_no_indexer_tokens_per_second(tmp_path):
    records, result = make_sweep(home_in(tmp_path), streaming_spec(filler_us=[0, 300], fabric="process_group"))
    plain, filled = result.cells
    assert plain.arms[0].tokens_per_s > 0
    assert filled.arms[0].tokens_per_s is None
    assert any("filler 300 us" in line for line in caveats(result))
    assert load_result(records, result.sweep_id).cells[1].cell["filler_us"] == 300
    records.close()


def test_the_plan_counts_the_layers_of_a_chain():
    def minutes(*overrides):
        spec = catalogue.load("quickstart", ["cells.fabric=emulated_20mbit", "cells.split=zigzag", *overrides])
        return preview(spec, spec.expand().cells)[0]

    drained, chain = minutes(), minutes("cells.regime=streaming")
    filled = minutes("cells.regime=streaming", "cells.filler_us=50000", "cells.skew_us=100")
    assert 2 * drained.minutes < chain.minutes < 4 * drained.minutes
    assert filled.minutes > 1.5 * chain.minutes
    assert filled.notes[-2:] == (
        "a trial is a chain of 4 layers, with 50000 us of filler each",
        "the last rank starts 100 us late",
    )
    assert drained.notes == ("emulated link",)


def test_mlflow_names_what_is_not_at_rest(tmp_path):
    """Skew and filler are tags and params where a cell has them, and clutter nothing where none does."""
    spec = streaming_spec(filler_us=[0, 300], skew_us=50, fabric="process_group")
    records, result = make_sweep(home_in(tmp_path), spec)
    runs = {(run.cell_id, run.arm): run for run in plan_runs(records.sweep(result.sweep_id), spec, result, {})}
    plain, filled = (runs[cell.cell["cell_id"], "overlapped"] for cell in result.cells)
    summary = runs["", ""]
    assert {run.tags["regime"] for run in runs.values()} == {"streaming"}
    assert (plain.tags["skew_us"], filled.tags["skew_us"], summary.tags["skew_us"]) == ("50", "50", "50")
    assert "filler_us" not in plain.tags
    assert (filled.tags["filler_us"], filled.params["filler_us"], summary.tags["filler_us"]) == ("300", "300", "0,300")
    assert filled.params["planted_wait_us"] == "0.0"
    assert "speed/tok_s" in plain.metrics
    assert "speed/tok_s" not in filled.metrics
    assert plain.metrics["gather/latest_us"] == max(result.cells[0].lateness_us)
    assert "host_bound" not in plain.tags
    records.close()
    others, quiet = make_sweep(home_in(tmp_path / "quiet"), make_spec())
    for run in plan_runs(others.sweep(quiet.sweep_id), make_spec(), quiet, {}):
        assert not {"skew_us", "filler_us"} & {*run.tags, *run.params}
    others.close()


def test_an_interval_that_excludes_1_beside_unresolved_is_explained(tmp_path):
    records, result = make_sweep(home_in(tmp_path), make_spec())
    (arm,) = (arm for arm in result.cells[0].arms if arm.arm == "overlapped")
    assert arm.comparison is not None
    apart = replace(arm.comparison, ratio=Interval(1.03, 1.01, 1.05))
    asked = replace(arm, verdict=Verdict.UNRESOLVED, comparison=apart, reason="the fastest ranks do not bear it out")
    disputed = replace(result, cells=(replace(result.cells[0], arms=(result.cells[0].arms[0], asked)), *result.cells[1:]))
    line = "overlapped in 1 cell: UNRESOLVED though the interval excludes 1: the fastest ranks do not bear it out"
    assert line in caveats(disputed)
    around = replace(asked, comparison=replace(apart, ratio=Interval(1.0, 0.98, 1.02)))
    quiet = replace(result, cells=(replace(result.cells[0], arms=(result.cells[0].arms[0], around)), *result.cells[1:]))
    assert not any("excludes 1" in line for line in caveats(quiet))
    records.close()


def test_a_host_bound_arm_says_so(tmp_path):
    spec = make_spec()
    records, result = make_sweep(home_in(tmp_path), spec)
    arms = tuple(replace(arm, host_bound=arm.arm == "overlapped") for arm in result.cells[0].arms)
    bound = replace(result, cells=(replace(result.cells[0], arms=arms), *result.cells[1:]))
    assert any(line.startswith(f"host bound in {result.cells[0].label}: overlapped:") for line in caveats(bound))
    assert not any(line.startswith("host bound") for line in caveats(result))
    runs = {
        run.arm: run
        for run in plan_runs(records.sweep(result.sweep_id), spec, bound, {})
        if run.cell_id == bound.cells[0].cell["cell_id"]
    }
    assert (runs["baseline"].tags["host_bound"], runs["overlapped"].tags["host_bound"]) == ("false", "true")
    records.close()
