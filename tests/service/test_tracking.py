"""Publishing to a real MLflow on SQLite: what a run says, and that each is there exactly once whatever happened before."""

from __future__ import annotations

import json
import math
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from experiments.names import Lane, SweepStatus
from experiments.spec.experiment import ExperimentSpec
from service.judge.accounting import AccountSummary
from service.judge.interval import Interval
from service.judge.results import SweepResult
from service.run.sweep import load_result
from service.store import tracking
from service.store.home import TRACKING_ENV_VAR, Home
from service.store.mlflow_store import explain, is_remote, open_store, shown
from service.store.note import MAX_NOTE_BYTES, full_table, note
from service.store.parquet import TIME_COLUMNS, arm_trials
from service.store.planned_run import COMPLETE_TAG, KEY_TAG, plan_runs
from service.store.records import Records
from service.store.trace_files import write_trace_files
from service.store.tracking import TrackingError, publish
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


def client_of(home: Home) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(home.tracking_uri)


def runs_of(home: Home) -> list[Any]:
    client = client_of(home)
    ids = [e.experiment_id for e in client.search_experiments()]
    return list(client.search_runs(ids, max_results=1000))


def by_key(home: Home) -> dict[str, Any]:
    runs = runs_of(home)
    keys = [run.data.tags[KEY_TAG] for run in runs]
    assert len(set(keys)) == len(keys), "a run is there twice"
    return dict(zip(keys, runs, strict=True))


def artifact(home: Home, run: Any, name: str) -> Path:
    (path,) = home.artifacts.rglob(f"{run.info.run_id}/artifacts/{name}")
    return path


def expected_keys(result: SweepResult) -> set[str]:
    arms = {f"{result.sweep_id}/{cell.cell['cell_id']}/{arm.arm}" for cell in result.cells for arm in cell.arms}
    return arms | {f"{result.sweep_id}/summary"}


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


def test_repeating_changes_nothing(home: Home) -> None:
    records, result = make_sweep(home, make_spec())
    first = publish(records, result.sweep_id, result, home)
    before = {key: run.info.run_id for key, run in by_key(home).items()}
    again = publish(records, result.sweep_id, result, home)
    assert (again.num_runs_created, again.num_runs_kept) == (0, 5)
    assert again.summary_run_id == first.summary_run_id
    assert {key: run.info.run_id for key, run in by_key(home).items()} == before


@pytest.mark.parametrize("call", ["create_run", "log_artifacts", "log_batch", "set_terminated"])
@pytest.mark.parametrize("at", [1, 3, 5])
def test_after_a_crash_anywhere_each_run_is_there_once(home: Home, monkeypatch: pytest.MonkeyPatch, call: str, at: int) -> None:
    from mlflow.tracking import MlflowClient

    records, result = make_sweep(home, make_spec())
    real = getattr(MlflowClient, call)
    count = 0

    def fail_once(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == at:
            raise OSError("the disk went away")
        return real(*args, **kwargs)

    monkeypatch.setattr(MlflowClient, call, fail_once)
    with pytest.raises(TrackingError, match="the disk went away"):
        publish(records, result.sweep_id, result, home)
    assert records.unpublished(home.tracking_uri) == [result.sweep_id]
    done = publish(records, result.sweep_id, result, home)
    runs = by_key(home)
    assert set(runs) == expected_keys(result)
    assert (done.num_runs_kept, done.num_runs_created) == (at - 1, 6 - at)
    assert all(run.data.tags[COMPLETE_TAG] == "true" and run.info.end_time for run in runs.values())
    assert all(artifact(home, run, "spec.yaml").exists() for run in runs.values())
    assert records.unpublished(home.tracking_uri) == []


def test_two_publishers_at_once_make_each_run_once(home: Home) -> None:
    _, result = make_sweep(home, make_spec())
    done: list[tracking.Published] = []

    def work() -> None:
        mine = Records(home.records)
        done.append(publish(mine, result.sweep_id, load_result(mine, result.sweep_id), home))
        mine.close()

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert set(by_key(home)) == expected_keys(result)
    assert sorted(p.num_runs_created for p in done) == [0, 5]


def test_a_server_that_is_down_is_said_at_once_and_made_up_for(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    records, result = make_sweep(home, make_spec())
    embedded = home.tracking_uri
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    monkeypatch.setenv(TRACKING_ENV_VAR, f"http://me:secret@127.0.0.1:{port}")
    started = time.monotonic()
    with pytest.raises(TrackingError, match="connection refused") as caught:
        publish(records, result.sweep_id, result, home)
    assert time.monotonic() - started < 10
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert records.unpublished(embedded) == [result.sweep_id]
    monkeypatch.delenv(TRACKING_ENV_VAR)
    publish(records, result.sweep_id, result, home)
    assert records.unpublished(embedded) == []


@pytest.mark.parametrize(
    "content", [b"no database at all, and long enough that SQLite reads it as a header" * 20, None], ids=["garbage", "folder"]
)
def test_a_database_that_cannot_be_opened_is_said_at_once(home: Home, content: bytes | None) -> None:
    records, result = make_sweep(home, make_spec())
    path = home.folder / "mlflow.db"
    path.unlink()
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    started = time.monotonic()
    with pytest.raises(TrackingError):
        publish(records, result.sweep_id, result, home)
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("uri", ["postgresql://me:secret@127.0.0.1:1/runs", "nonsense://me:secret@host/runs"])
def test_another_database_out_of_reach_is_said_at_once(home: Home, monkeypatch: pytest.MonkeyPatch, uri: str) -> None:
    """No driver installed, or a refused connection: either way one line."""
    records, result = make_sweep(home, make_spec())
    monkeypatch.setenv(TRACKING_ENV_VAR, uri)
    started = time.monotonic()
    with pytest.raises(TrackingError) as caught:
        publish(records, result.sweep_id, result, home)
    assert time.monotonic() - started < 10
    assert "secret" not in str(caught.value)


def test_a_folder_as_a_store_is_refused(home: Home, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    records, result = make_sweep(home, make_spec())
    monkeypatch.setenv(TRACKING_ENV_VAR, f"file://{tmp_path}/mlruns")
    with pytest.raises(TrackingError, match="sqlite:"):
        publish(records, result.sweep_id, result, home)


def test_a_deleted_experiment_is_said_with_its_cure(home: Home) -> None:
    records, result = make_sweep(home, make_spec())
    done = publish(records, result.sweep_id, result, home)
    client_of(home).delete_experiment(done.experiment_id)
    with pytest.raises(TrackingError, match="mlflow experiments restore"):
        publish(records, result.sweep_id, result, home)


def test_a_running_sweep_is_not_published(home: Home) -> None:
    spec = make_spec()
    records, result = make_sweep(home, spec)
    records.start_sweep("still-running", spec, spec.expand().cells, ENVIRONMENT, None)
    with pytest.raises(TrackingError, match="has not ended"):
        publish(records, "still-running", result, home)


def test_artifacts_stay_below_the_home(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the working directory and the suite's name."""
    elsewhere = tmp_path / "a job's folder"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    spec = make_spec(suite="suite/../../../escape")
    records, result = make_sweep(home, spec)
    done = publish(records, result.sweep_id, result, home)
    for experiment in client_of(home).search_experiments():
        if experiment.experiment_id == done.experiment_id:
            assert experiment.name == spec.suite
            assert experiment.artifact_location == (home.artifacts / "suite_escape").as_uri()
    assert list(elsewhere.iterdir()) == []
    assert len(list((home.artifacts / "suite_escape").rglob("samples.parquet"))) == 4


def test_another_database_keeps_artifacts_in_the_home(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TRACKING_ENV_VAR, f"sqlite:///{tmp_path}/deep/other.db")
    store = open_store(home, "other")
    assert store.client.get_experiment(store.experiment_id).artifact_location == (home.artifacts / "other").as_uri()
    assert store.client.get_experiment("0").artifact_location.startswith(home.artifacts.as_uri())


def test_a_driver_killed_while_making_the_store_leaves_nothing_in_the_way(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    (home.folder / "mlflow.db").unlink()
    unfinished = home.folder / "mlflow.db.unfinished"
    with sqlite3.connect(unfinished) as db:
        db.execute("CREATE TABLE experiments (half_made INTEGER)")
    db.close()
    records, result = make_sweep(home, make_spec())
    publish(records, result.sweep_id, result, home)
    assert set(by_key(home)) == expected_keys(result)
    assert not unfinished.exists()


def test_runs_of_several_scopes_have_distinct_names(home: Home) -> None:
    cells = {"cp_size": 2, "split": "zigzag", "fabric": ["process_group", "emulated_20mbit"], "scope": ["qk", "indexer"]}
    spec = make_spec(cells=cells)
    records, result = make_sweep(home, spec)
    runs = plan_runs(records.sweep(result.sweep_id), spec, result, {})
    assert len({run.name for run in runs}) == len({run.key for run in runs}) == len(runs) == 9


def test_mlflow_is_not_imported_before_it_is_needed() -> None:
    code = (
        "import sys, service.store.tracking, service.store.dashboard; print({'mlflow', 'pyarrow', 'filelock'} & set(sys.modules))"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_credentials_never_show() -> None:
    assert shown("MLflow at http://me:pw@host:1/x") == "MLflow at http://***@host:1/x"
    assert shown("sqlite:////a/b.db") == "sqlite:////a/b.db"
    assert is_remote("https://x")
    assert not is_remote("sqlite:///x")
    assert str(explain("sqlite:///x", OSError(28, "No space left"))) == "MLflow at sqlite:///x: [Errno 28] No space left"


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
