"""What a published run says: identity, metrics, artifacts and the note, in a real MLflow on SQLite."""

from __future__ import annotations

import json
import math
import shutil
import time
from datetime import UTC, datetime

import pyarrow.parquet as pq
import pytest
import yaml

from experiments.names import Lane, SweepStatus
from experiments.spec.experiment import ExperimentSpec
from service.judge.accounting import AccountSummary
from service.judge.interval import Interval
from service.store.home import Home
from service.store.note import MAX_NOTE_BYTES, full_table, note
from service.store.parquet import TIME_COLUMNS, arm_trials
from service.store.planned_run import plan_runs
from service.store.trace_files import write_trace_files
from service.store.tracking import publish
from tests.service.mlflow_runs import artifact, by_key, client_of, expected_keys
from tests.service.synthetic import ENVIRONMENT, make_spec, make_sweep
from workers.messages import ArmTrace, TraceReport
from workers.timeline import Span

SPEED = ("speed/", "latency/", "gather/", "account/", "ratio/", "samples/")


IDENTITY = (
    *(
        "cplab.key",
        "sweep_id",
        "cell_id",
        "arm",
        "role",
        "verdict",
        "methodology_version",
        "revision",
        "dirty",
        "fabric",
        "emulated",
    ),
    *("simulated", "device", "split", "cp_size", "scope", "regime", "dims", "experiment", "spec_hash", "hosts", "night"),
)


def test_a_sweep_becomes_a_summary_and_flat_runs(home: Home, capfd: pytest.CaptureFixture[str]) -> None:
    spec = make_spec()
    records, result = make_sweep(home, spec)
    done = publish(records, result.sweep_id, result, home)
    runs = by_key(home)
    assert set(runs) == expected_keys(result)
    assert (done.num_runs_created, done.num_runs_kept, done.uri) == (5, 0, home.tracking_uri)
    assert runs[f"{result.sweep_id}/summary"].info.run_id == done.summary_run_id
    assert {run.info.run_name for run in runs.values()} == {
        f"planted-{result.sweep_id}",
        *(f"{arm}-new64-cp2-zigzag-{link}" for arm in spec.arms for link in ("process_group", "emulated_20mbit")),
    }
    assert all(run.info.status == "FINISHED" for run in runs.values())
    assert all("mlflow.parentRunId" not in run.data.tags for run in runs.values())
    assert client_of(home).get_experiment(done.experiment_id).name == spec.suite
    assert records.unpublished(home.tracking_uri) == []
    captured = capfd.readouterr()
    assert captured.out + captured.err == "", "MLflow talks to the user"


def test_every_run_carries_its_identity(home: Home) -> None:
    records, result = make_sweep(home, make_spec())
    publish(records, result.sweep_id, result, home)
    for key, run in by_key(home).items():
        tags = run.data.tags
        assert not [name for name in IDENTITY if not tags.get(name)], key
        assert tags["sweep_id"] == result.sweep_id
        assert tags["hosts"] == "planted-host"
        assert tags["dirty"] == "false"
        assert tags["night"] == datetime.now(UTC).strftime("%Y-%m-%d")
        assert tags["mlflow.source.git.commit"] == ENVIRONMENT["revision"]
    runs = by_key(home)
    summary = runs.pop(f"{result.sweep_id}/summary").data.tags
    assert (summary["role"], summary["emulated"], summary["simulated"]) == ("summary", "mixed", "false")
    assert summary["verdict"] == "2 FASTER"
    for run in runs.values():
        assert run.data.tags["emulated"] == str(run.data.tags["fabric"].startswith("emulated")).lower()
        assert run.data.tags["verdict"] == ("BASELINE" if run.data.tags["arm"] == "baseline" else "FASTER")
        params = run.data.params
        assert (params["arm"], params["new_tokens"], params["launches"]) == (run.data.tags["arm"], "64", "5")
        assert params["schedule"] == {"baseline": "serial", "overlapped": "overlap_rotate"}[params["arm"]]


def test_metrics_are_the_records_and_named_alike_on_every_arm(home: Home) -> None:
    records, result = make_sweep(home, make_spec())
    publish(records, result.sweep_id, result, home)
    runs = by_key(home)
    for cell in result.cells:
        baseline, overlapped = (runs[f"{result.sweep_id}/{cell.cell['cell_id']}/{arm.arm}"].data.metrics for arm in cell.arms)
        arm = cell.arms[1]
        assert arm.comparison is not None
        assert arm.latency is not None
        assert arm.account is not None
        assert arm.account.hidden is not None
        more = set(overlapped) - set(baseline)
        assert not set(baseline) - set(overlapped)
        assert all(name.startswith("ratio/") or name == "samples/pairs" for name in more), more
        said = {
            "speed/tok_s": arm.tokens_per_s,
            "latency/p50_us": arm.latency.p50_us,
            "latency/p90_us": arm.latency.p90_us,
            "latency/max_us": arm.latency.max_us,
            "latency/min_p50_us": arm.latency.fastest_rank_p50_us,
            "gather/p50_us": arm.gather_p50_us,
            "ratio/time": arm.comparison.ratio.estimate,
            "ratio/low": arm.comparison.ratio.low,
            "ratio/high": arm.comparison.ratio.high,
            "ratio/detect_pct": arm.comparison.detectable_pct,
            "account/saved_us": arm.account.saved_us.estimate,
            "account/tax_us": arm.account.fork_join_tax_us.estimate,
            "account/contend_us": arm.account.contention_us.estimate,
            "account/hidden_pct": 100 * arm.account.hidden.estimate,
            "account/hidden_low": 100 * arm.account.hidden.low,
            "check/recall": 1.0,
            "check/faults": 0.0,
        }
        for name, value in said.items():
            assert overlapped[name] == pytest.approx(value), name
        assert overlapped["ratio/low"] < overlapped["ratio/time"] < overlapped["ratio/high"] < 1
        assert ("gather/late_us" in overlapped) == (cell.gather_floor_us is not None)
        assert all(len(name.split("/")[1]) <= 11 and name.count("/") == 1 for name in overlapped)


def test_an_invalid_cell_shows_no_speed_and_failed(home: Home) -> None:
    records, result = make_sweep(home, make_spec(), invalid=[1])
    publish(records, result.sweep_id, result, home)
    invalid = result.cells[1].cell["cell_id"]
    for key, run in by_key(home).items():
        is_invalid = f"/{invalid}/" in key
        if key.endswith("/summary"):
            assert run.data.tags["verdict"] == "1 FASTER, 2 INVALID"
            assert "rank 1 differs \\| in 3 rows" in run.data.tags["mlflow.note.content"]
            continue
        assert run.info.status == ("FAILED" if is_invalid else "FINISHED")
        assert any(name.startswith(SPEED) for name in run.data.metrics) is not is_invalid
        if is_invalid:
            assert run.data.tags["verdict"] == "INVALID"
            assert run.data.metrics["check/faults"] == 1
            metadata = pq.read_schema(artifact(home, run, "samples.parquet")).metadata
            assert metadata[b"cplab.verdict"] == b"INVALID"


def test_infinite_figures_are_not_logged(home: Home) -> None:
    """One launch bounds nothing: its intervals are infinite."""
    records, result = make_sweep(home, make_spec(), launches=1, status=SweepStatus.KILLED)
    account = result.cells[0].arms[1].account
    assert isinstance(account, AccountSummary)
    assert math.isinf(account.saved_us.high)
    publish(records, result.sweep_id, result, home)
    for run in by_key(home).values():
        assert run.info.status == "KILLED"
        assert all(math.isfinite(value) and abs(value) < 1e300 for value in run.data.metrics.values())
        assert "account/saved_high" not in run.data.metrics
        text = artifact(home, run, "environment.json").read_text()
        json.loads(text, parse_constant=pytest.fail)
        if run.data.tags["role"] == "summary":
            saved = json.loads(artifact(home, run, "result.json").read_text(), parse_constant=pytest.fail)
            assert saved["cells"][0]["arms"][1]["account"]["saved_us"]["high"] is None
            assert run.data.tags["failure"] == "ended by a planted cause"


def test_times_are_those_of_the_measurement(home: Home) -> None:
    records, result = make_sweep(home, make_spec())
    row = records.sweep(result.sweep_id)
    time.sleep(0.05)
    publish(records, result.sweep_id, result, home)
    spans = records.cell_spans(result.sweep_id)
    for run in by_key(home).values():
        start_s, end_s = spans.get(run.data.tags["cell_id"], (row["started_s"], row["ended_s"]))
        assert (run.info.start_time, run.info.end_time) == (round(start_s * 1000), round(end_s * 1000))
        assert run.info.end_time <= row["ended_s"] * 1000 + 1


def test_parquet_holds_every_trial_of_the_arm(home: Home) -> None:
    records, result = make_sweep(home, make_spec())
    publish(records, result.sweep_id, result, home)
    runs = by_key(home)
    for record in records.cells(result.sweep_id):
        total = 0
        for arm in ("baseline", "overlapped"):
            run = runs[f"{result.sweep_id}/{record.cell['cell_id']}/{arm}"]
            rows = pq.read_table(artifact(home, run, "samples.parquet")).to_pylist()
            trials = [t for t in record.trials if t.variant.split("/")[0] in ((arm, "_aa") if arm == "baseline" else (arm,))]
            expected = [
                {
                    **{name: getattr(trial, name) for name in ("launch", "block", "kind", "row", "step", "variant")},
                    "rank": rank,
                    **{name: getattr(trial, name)[rank] for name in TIME_COLUMNS},
                }
                for trial in trials
                for rank in range(2)
            ]
            assert rows == expected
            assert {row["variant"] for row in rows} >= {arm, f"{arm}/prefilled"}
            total += len(trials)
        assert total == len(record.trials)


def test_the_control_arm_goes_with_the_baseline(home: Home) -> None:
    """With no serial arm in the spec the controls add one: its trials must not be lost."""
    arms = {"baseline": {"schedule": "overlap_rotate"}, "overlapped": {"schedule": "overlap_rotate"}}
    records, result = make_sweep(home, make_spec(arms=arms))
    trials = records.cells(result.sweep_id)[0].trials
    assert {t.variant for t in arm_trials(trials, "baseline")} >= {"baseline", "_serial", "_serial/prefilled"}
    assert sum(len(arm_trials(trials, arm)) for arm in arms) == len(trials)


def test_spec_environment_and_table_are_artifacts(home: Home) -> None:
    spec = make_spec()
    records, result = make_sweep(home, spec)
    done = publish(records, result.sweep_id, result, home)
    for run in by_key(home).values():
        saved = yaml.safe_load(artifact(home, run, "spec.yaml").read_text())
        assert ExperimentSpec.model_validate(saved) == spec
        environment = json.loads(artifact(home, run, "environment.json").read_text())
        assert environment["revision"] == ENVIRONMENT["revision"]
        assert len(environment["launches"]) == 5
    summary = client_of(home).get_run(done.summary_run_id)
    table = artifact(home, summary, "table.md").read_text()
    assert all(cell.label in table for cell in result.cells)
    assert json.loads(artifact(home, summary, "result.json").read_text())["sweep_id"] == result.sweep_id


def test_the_note_says_verdicts_hardware_and_emulation(home: Home) -> None:
    records, result = make_sweep(home, make_spec())
    done = publish(records, result.sweep_id, result, home)
    text = client_of(home).get_run(done.summary_run_id).data.tags["mlflow.note.content"]
    arm = result.cells[0].arms[1]
    assert arm.comparison is not None
    assert f"{arm.comparison.ratio.estimate:.3f} [" in text
    assert f"{arm.tokens_per_s:,.0f}" in text
    for words in ("| overlapped | FASTER |", "planted CPU", "emulated links (emulated_20mbit)", "95 %"):
        assert words in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 4
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1


def test_a_long_note_keeps_the_decisive_rows(home: Home) -> None:
    spec = make_spec(60, cells={"cp_size": 2, "split": "zigzag", "fabric": ["process_group", "emulated_20mbit"]})
    _, result = make_sweep(home, spec, invalid=[57, 58, 59], launches=2)
    text = note(result)
    assert len(text.encode()) <= MAX_NOTE_BYTES < 8000
    rows = [line for line in text.splitlines() if line.startswith("| new")]
    assert len(rows) > 20
    assert all("INVALID" in row for row in rows[:6])
    assert all("FASTER" in row for row in rows[6:])
    assert f"the other {120 - len(rows)} are in `table.md`" in text
    table = full_table(result)
    assert sum(line.startswith("| new") for line in table.splitlines()) == 120


def test_a_note_of_nothing_but_failures_stays_short(home: Home) -> None:
    _, result = make_sweep(home, make_spec(60), invalid=range(60), launches=1)
    text = note(result)
    assert len(text.encode()) <= MAX_NOTE_BYTES
    assert "more in `table.md`" in text
    assert sum(line.startswith("| new") for line in text.splitlines()) > 10


def test_runs_of_several_scopes_have_distinct_names(home: Home) -> None:
    cells = {"cp_size": 2, "split": "zigzag", "fabric": ["process_group", "emulated_20mbit"], "scope": ["qk", "indexer"]}
    spec = make_spec(cells=cells)
    records, result = make_sweep(home, spec)
    runs = plan_runs(records.sweep(result.sweep_id), spec, result, {})
    assert len({run.name for run in runs}) == len({run.key for run in runs}) == len(runs) == 9


def test_intervals_of_shares_are_per_cent() -> None:
    from service.store.planned_run import _percent

    assert _percent("hidden", Interval(0.5, -0.1, 1.2)) == {
        "account/hidden_pct": 50.0,
        "account/hidden_low": -10.0,
        "account/hidden_high": 120.0,
    }


def test_traces_are_attached_to_the_arms_of_valid_cells_and_made_again_when_lost(home: Home) -> None:
    records, result = make_sweep(home, make_spec(), invalid=[1])
    traced, invalid = (cell.cell["cell_id"] for cell in result.cells)
    spans = [(Span("rotate_q", Lane.MAIN, rank, 5, 9), Span("gather", Lane.MAIN, rank, 10, 20)) for rank in (0, 1)]
    reports = [
        TraceReport(rank, tuple(ArmTrace(arm, 0, 21, spans[rank]) for arm in ("baseline", "overlapped")), (), 0, 0)
        for rank in (0, 1)
    ]
    for cell_id in (traced, invalid):
        records.add_trace(result.sweep_id, cell_id, 4, reports)
    files = write_trace_files(home, records, result)
    assert set(files) == {traced}, "an INVALID cell shows no speed in any form"
    shutil.rmtree(home.traces)
    publish(records, result.sweep_id, result, home)
    for key, run in by_key(home).items():
        names = {path.name for path in home.artifacts.rglob(f"{run.info.run_id}/artifacts/*")}
        assert ({"trace.json", "lanes.png"} <= names) is (f"/{traced}/" in key)
    events = json.loads(files[traced][0].read_text())
    assert events["otherData"]["cell_id"] == traced
    before = files[traced][1].stat().st_mtime_ns
    write_trace_files(home, records, result)
    assert files[traced][1].stat().st_mtime_ns == before, "drawn once"
