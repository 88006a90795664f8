"""`cplab gc`: what goes by age, what never goes, and what was left RUNNING gets its true state. One home of published nights for most of it."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from experiments.errors import UserError
from experiments.names import SweepStatus
from service.cli import app
from service.errors import ExitCode
from service.history.nights import histories, nights_of
from service.history.store import Blessing, NightStore, Outcome
from service.nightly.leftovers import ABANDONED_S
from service.nightly.retention import DAY_S
from service.run.resume import resumption
from service.store.claim import claimed
from service.store.home import HOME_ENV_VAR, Home
from service.store.judged import load_result
from service.store.planned_run import KEY_TAG
from service.store.records import Records
from service.store.tracking import publish
from tests.service import synthetic
from tests.service.mlflow_runs import client_of, runs_of
from tests.service.synthetic import make_spec, make_sweep

GOOD, REGRESSED, BLESSED, PLAIN, YOUNG, UNPUBLISHED = (f"2026010{i}-000001-abcd" for i in range(1, 7))
NIGHTS = {sweep_id: f"2026-01-0{i + 1}" for i, sweep_id in enumerate([GOOD, REGRESSED, BLESSED, PLAIN, YOUNG, UNPUBLISHED])}
OLD_DAYS = 400


@pytest.fixture
def records(home: Home, monkeypatch: pytest.MonkeyPatch) -> Iterator[Records]:
    monkeypatch.setenv(HOME_ENV_VAR, str(home.folder))
    with contextlib.closing(Records(home.records)) as found:
        yield found


def gc(*words: str) -> Any:
    return CliRunner().invoke(app, ["gc", *words])


def age(records: Records, sweep_id: str, days: float) -> None:
    then = time.time() - days * DAY_S
    records.connection.execute("UPDATE sweep SET started_s=?, ended_s=? WHERE sweep_id=?", (then - 60, then, sweep_id))


def trials(records: Records, sweep_id: str) -> int:
    return int(records.connection.execute("SELECT COUNT(*) FROM trial WHERE sweep_id=?", (sweep_id,)).fetchone()[0])


def pages(records: Records) -> int:
    return int(records.connection.execute("PRAGMA page_count").fetchone()[0])


def artifact_files(home: Home, sweep_id: str) -> set[str]:
    runs = {run.info.run_id for run in runs_of(home) if run.data.tags["sweep_id"] == sweep_id}
    return {path.name for path in home.artifacts.rglob("*.*") if path.parent.parent.name in runs}


def ours_of(home: Home) -> list[Any]:
    return [run for run in runs_of(home) if KEY_TAG in run.data.tags]


@pytest.fixture
def nights(home: Home, records: Records, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Records:
    """Six nights, all but one said to be published (those of the parameter truly: it takes a second), all but one old, each with a trace."""
    truly = getattr(request, "param", ())
    for sweep_id, night in NIGHTS.items():
        monkeypatch.setitem(synthetic.ENVIRONMENT, "night", night)
        other, result = make_sweep(home, make_spec(), sweep_id)
        other.close()
        records.connection.execute("INSERT INTO trace VALUES (?,?,0,?)", (sweep_id, result.cells[0].cell["cell_id"], "[]"))
        if sweep_id in truly:
            publish(records, sweep_id, result, home)
        elif sweep_id != UNPUBLISHED:
            records.mark_published(sweep_id, home.tracking_uri)
        folder = home.traces / sweep_id / "a cell"
        folder.mkdir(parents=True)
        (folder / "trace.json").write_text("x" * 1000)
        age(records, sweep_id, 1 if sweep_id == YOUNG else OLD_DAYS)
    for run in runs_of(home):
        for folder in home.artifacts.rglob(f"{run.info.run_id}/artifacts"):
            (folder / "trace.json").write_text("a trace")
    with contextlib.closing(NightStore(home.folder)) as store:
        ends = {
            "last_good": {"night": NIGHTS[GOOD], "sweep_id": GOOD},
            "first_bad": {"night": NIGHTS[REGRESSED], "sweep_id": REGRESSED},
        }
        summary = {"findings": [{"is_worse": True, **ends}]}
        store.keep_outcome(Outcome("planted", NIGHTS[REGRESSED], REGRESSED, "REGRESSION", 1, summary))
        store.keep_outcome(Outcome("planted", NIGHTS[PLAIN], PLAIN, "FINE", 0, {"findings": []}))
        store.bless("planted", Blessing(NIGHTS[BLESSED], BLESSED, "looked at", "somebody", 1.0))
    return records


@pytest.mark.parametrize("nights", [(PLAIN, REGRESSED)], indirect=True)
def test_old_traces_and_samples_go_except_where_somebody_will_ask(home: Home, nights: Records) -> None:
    before = {sweep_id: (trials(nights, sweep_id), artifact_files(home, sweep_id)) for sweep_id in NIGHTS}
    with contextlib.closing(NightStore(home.folder)) as store:
        history = histories(nights, store, nights_of(nights, "planted"))
    size = pages(nights)

    dry = gc("--dry-run")
    assert dry.exit_code == ExitCode.FINE
    for what in ("traces", "samples"):
        (line,) = re.findall(rf"^{what} +(\S+) planted, night (\S+), {OLD_DAYS} days old: \d", dry.output, re.MULTILINE)
        assert line == (PLAIN, NIGHTS[PLAIN])
    for why in ("blessed", "regressed", "beside a regressed one", "not in MLflow yet"):
        assert f"1 old sweeps: {why}" in dry.output
    assert "nothing was done" in dry.output
    assert before == {sweep_id: (trials(nights, sweep_id), artifact_files(home, sweep_id)) for sweep_id in NIGHTS}

    done = gc()
    assert done.exit_code == ExitCode.FINE, done.output
    assert trials(nights, PLAIN) == 0
    assert not (home.traces / PLAIN).exists()
    gone = before[PLAIN][1] - artifact_files(home, PLAIN)
    assert gone == {"trace.json", "samples.parquet", "records.json.gz"}
    assert {"report.html", "result.json", "table.md", "spec.yaml"} <= artifact_files(home, PLAIN)
    for sweep_id in set(NIGHTS) - {PLAIN}:
        assert (trials(nights, sweep_id), artifact_files(home, sweep_id)) == before[sweep_id], sweep_id
        assert (home.traces / sweep_id).is_dir()
        load_result(nights, sweep_id)
    assert pages(nights) < size, "the room is given back"
    assert "0 pieces" in gc().output

    with pytest.raises(UserError, match=r"report\.html"):
        load_result(nights, PLAIN)
    nights.connection.execute("UPDATE sweep SET status='KILLED' WHERE sweep_id=?", (PLAIN,))
    with pytest.raises(UserError, match="removed on"):
        resumption(nights, PLAIN)
    nights.connection.execute("UPDATE sweep SET status='FINISHED' WHERE sweep_id=?", (PLAIN,))
    assert PLAIN not in nights.unpublished("sqlite:///elsewhere.db"), "it can not be published again"
    for known in (True, False):
        with contextlib.closing(NightStore(home.folder)) as store:
            if not known:
                store._db.execute("DELETE FROM points")
            again = histories(nights, store, nights_of(nights, "planted"))
        assert [len(h.points) for h in again] == [len(h.points) - (not known) for h in history], "its figures stay in the history"


def test_ages_are_the_users(nights: Records) -> None:
    assert f"samples  {YOUNG}" in gc("--dry-run", "--samples-days", "0.5").output
    assert "0 pieces" in gc("--dry-run", "--samples-days", "500", "--traces-days", "500").output
    assert gc("--samples-days", "-1").exit_code == ExitCode.USER_ERROR


def test_it_does_nothing_while_a_sweep_is_measured(home: Home, nights: Records) -> None:
    nights.connection.execute("UPDATE sweep SET status='RUNNING', ended_s=NULL WHERE sweep_id=?", (YOUNG,))
    before = trials(nights, PLAIN)
    with claimed(home.records, YOUNG):
        done = gc()
        assert done.exit_code == ExitCode.INFRASTRUCTURE
        assert f"{YOUNG} is being measured" in done.stderr
        assert gc("--dry-run").exit_code == ExitCode.FINE
    assert trials(nights, PLAIN) == before


@pytest.mark.parametrize("status", [SweepStatus.FINISHED, SweepStatus.KILLED])
def test_runs_left_running_get_the_state_that_the_records_have(home: Home, records: Records, status: SweepStatus) -> None:
    other, result = make_sweep(home, make_spec(), launches=3, invalid=[0], status=status)
    other.close()
    publish(records, result.sweep_id, result, home)
    published = {run.data.tags[KEY_TAG]: run.info.status for run in runs_of(home)}
    assert len(set(published.values())) == 2, "an INVALID cell's runs are FAILED"
    client = client_of(home)
    for run in runs_of(home):
        client.update_run(run.info.run_id, status="RUNNING")
    # A driver that died while it published left this one; that of another home is not ours to judge.
    (experiment,) = {run.info.experiment_id for run in runs_of(home)}
    half = client.create_run(experiment, tags={KEY_TAG: f"{result.sweep_id}/lost/arm", "sweep_id": result.sweep_id}).info.run_id
    foreign = client.create_run(experiment, tags={KEY_TAG: "elsewhere/a/b", "sweep_id": "elsewhere"}).info.run_id
    nobody = client.create_run(experiment).info.run_id

    assert "MLflow run" in gc("--dry-run").output
    assert {run.info.status for run in ours_of(home)} == {"RUNNING"}
    assert gc().output.count("close    MLflow run") == len(published) + 1
    found = {run.info.run_id: run for run in ours_of(home)}
    closed = {run.data.tags[KEY_TAG]: run.info.status for run in found.values() if run.info.run_id not in (half, foreign)}
    assert closed == published
    assert (found[half].info.status, found[foreign].info.status, client.get_run(nobody).info.status) == (
        status.value,
        "RUNNING",
        "RUNNING",
    )


def test_a_sweep_whose_driver_died_is_killed_when_it_was_last_heard_of(home: Home, records: Records) -> None:
    other, result = make_sweep(home, make_spec(), launches=2)
    other.close()
    last_s = time.time() - 2 * ABANDONED_S
    ours = (result.sweep_id,)
    records.connection.execute(
        "UPDATE sweep SET status='RUNNING', ended_s=NULL, started_s=? WHERE sweep_id=?", (last_s - 9, *ours)
    )
    records.connection.execute("UPDATE block SET started_s=?, wall_us=0 WHERE sweep_id=?", (last_s, *ours))
    assert f"sweep {result.sweep_id}: KILLED" in gc("--dry-run").output
    assert records.sweep(result.sweep_id)["status"] == "RUNNING"
    gc()
    row = records.sweep(result.sweep_id)
    assert (row["status"], row["ended_s"]) == ("KILLED", pytest.approx(last_s))
    assert records.unpublished(home.tracking_uri) == [result.sweep_id]
    records.connection.execute("UPDATE sweep SET status='RUNNING', ended_s=NULL, started_s=?", (time.time(),))
    assert "0 left open" in gc().output, "a day is given to resume it"


def test_a_home_without_mlflow_gets_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(HOME_ENV_VAR, str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert gc().exit_code == ExitCode.FINE
    assert not (tmp_path / "mlflow.db").exists()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    done = gc()
    assert (done.exit_code, "nothing was done" in done.stderr) == (ExitCode.INFRASTRUCTURE, True)
