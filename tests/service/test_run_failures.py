"""The whole line with real parts when something in it is wrong: a schedule, a rank, a tracker, or the run is killed."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time

from service.errors import ExitCode
from tests.service.test_cli import ROOT, cplab
from tests.service.test_run import SMALL, arms_of


def test_a_broken_schedule_is_invalid_shows_no_speed_and_exits_3(tmp_path):
    broken = ["--set", "arms.overlapped.schedule=tests.workers.mutants:no_join"]
    done = cplab("run", "quickstart", *SMALL, *broken, "--json", str(tmp_path / "out.json"), home=tmp_path)
    assert done.returncode == ExitCode.INVALID
    assert "INVALID" in done.stdout
    assert "without joining" in done.stdout
    for arm in arms_of(tmp_path / "out.json").values():
        assert arm["verdict"] == "INVALID"
        assert arm["latency"] is None
        assert arm["tokens_per_s"] is None


def test_a_chain_that_is_wrong_between_layers_is_invalid_and_a_right_one_is_not(tmp_path):
    """One sweep, both regimes: the mutant is right in every layer by itself, so only the chain finds it out."""
    regimes = ["--set", "cells.regime=[drained,streaming]", "--set", "chain.layers=3", "--set", "cells.fabric=process_group"]
    broken = ["--set", "arms.overlapped.schedule=tests.workers.mutants_of_chain:starts_layers_early"]
    done = cplab("run", "quickstart", *SMALL, *regimes, *broken, "--json", str(tmp_path / "out.json"), home=tmp_path)
    assert done.returncode == ExitCode.INVALID, done.stderr
    drained, streaming = json.loads((tmp_path / "out.json").read_text())["cells"]
    assert drained["valid"]
    assert (streaming["regime"], streaming["layers"], streaming["valid"]) == ("streaming", 3, False)
    assert {fault["arm"] for fault in streaming["faults"]} == {"overlapped"}
    assert "last of 3 layers" in done.stdout


def test_a_schedule_that_raises_is_invalid_too(tmp_path):
    done = cplab("run", "quickstart", *SMALL, "--set", "arms.overlapped.schedule=tests.workers.mutants:raises", home=tmp_path)
    assert done.returncode == ExitCode.INVALID
    assert "a user's bug" in done.stdout


def test_a_tracker_that_is_down_costs_a_warning_and_sync_publishes_once(tmp_path):
    down = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
    done = cplab("run", "quickstart", *SMALL, home=tmp_path, **down)
    assert done.returncode == 0
    assert "cplab sync" in done.stderr
    assert "Traceback" not in done.stderr
    assert cplab("sync", home=tmp_path, **down).returncode == ExitCode.INFRASTRUCTURE
    for expected in ("MLflow:", "nothing to publish"):
        again = cplab("sync", home=tmp_path)
        assert again.returncode == 0
        assert expected in again.stdout
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    assert len(client.search_runs([client.get_experiment_by_name("nsa-indexer").experiment_id])) == 3


def test_sigterm_leaves_the_sweep_killed(tmp_path):
    env = {**os.environ, "CPLAB_HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    run = subprocess.Popen(
        [sys.executable, "-m", "service", "run", "quickstart"],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in run.stdout:
        if "prepare" in line:
            break
    time.sleep(1)
    run.send_signal(signal.SIGTERM)
    began = time.monotonic()
    while time.monotonic() - began < 10:
        with sqlite3.connect(tmp_path / "records.db") as db:
            status, failure = db.execute("SELECT status, failure FROM sweep").fetchone()
        if status != "RUNNING":
            break
        time.sleep(0.05)
    took = time.monotonic() - began
    assert (status, failure) == ("KILLED", "ended by SIGTERM")
    assert took < 2, f"{took:.1f} s: Ray kills after 3"
    assert run.wait(30) == ExitCode.INFRASTRUCTURE
    assert "killed" in run.stderr.read()


def test_a_lost_rank_is_named_and_exits_4(tmp_path):
    done = cplab("run", "quickstart", *SMALL, "--set", "arms.overlapped.schedule=tests.service.deserter:leaves", home=tmp_path)
    assert done.returncode == ExitCode.INFRASTRUCTURE
    assert "rank 1 on " in done.stdout
    assert "ended with exit code 7" in done.stdout
