"""Publishing to a real MLflow on SQLite: each run is there exactly once, whatever happened before."""

from __future__ import annotations

import socket
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from service.store import tracking
from service.store.home import TRACKING_ENV_VAR, Home
from service.store.judged import load_result
from service.store.mlflow_store import explain, is_remote, open_store, shown
from service.store.planned_run import COMPLETE_TAG
from service.store.records import Records
from service.store.tracking import TrackingError, publish
from tests.service.mlflow_runs import artifact, by_key, client_of, expected_keys
from tests.service.synthetic import ENVIRONMENT, make_spec, make_sweep


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
