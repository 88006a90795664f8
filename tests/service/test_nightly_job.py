"""`ray job submit ... -- python -m service nightly` on a real head: a quiet night succeeds, a planted regression fails, and people are told once.

Everything that a user would have is real: the head, the Jobs API with its token, the uploaded working directory, records, MLflow, a receiver. Only
times are simulated, so that the nights before, which are copies of one, are exact. It takes most of a minute, for two submitted jobs.
The timeouts are for a machine where everybody else computes, and leave the fixtures time to end the head.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from typer.testing import CliRunner

from experiments import catalogue
from service.cli import app
from service.history.store import NightStore
from service.history.suspect import MIN_NIGHTS
from service.nightly.webhook import URL_ENV_VAR
from service.run.local_ranks import local_group
from service.run.sweep import check, measure
from service.store.extract import _tables
from service.store.home import HOME_ENV_VAR, TRACKING_ENV_VAR, Home
from service.store.records import Records
from tests.service.test_cli import ROOT

pytestmark = [pytest.mark.jobs, pytest.mark.timeout(480)]

NIGHT = [
    *("--set", "device=simulated", "--set", "workload.new_tokens=384", "--set", "cells.split=zigzag"),
    *("--set", "cells.fabric=process_group", "--set", "measurement.launches=5", "--set", "measurement.trials_per_block=3"),
    *("--set", "measurement.control_trials=2", "--set", "measurement.warmup_trials=1"),
]
SLOWED = ["--set", "arms.overlapped.planted_wait_us=5"]
"""Of 100 us."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def inbox() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A receiver: where it is, and what it took."""
    taken: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            taken.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/hook", taken
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, template: Path) -> Home:
    """One measured night, and copies of it for the nights after."""
    found = Home(tmp_path_factory.mktemp("home"))
    shutil.copy(template, found.folder / "mlflow.db")
    spec = catalogue.load("nightly", NIGHT[1::2])
    with contextlib.closing(Records(found.records)) as records:
        first = measure(spec, check(spec), records, local_group, lambda _: None, {"night": "2026-01-01"}, [str(ROOT)])
        records.mark_published(first, f"sqlite:///{found.folder / 'mlflow.db'}")
        for night in range(2, MIN_NIGHTS):
            copy_sweep(records, first, f"{first}-{night}", f"2026-01-{night:02d}")
    return found


def copy_sweep(records: Records, sweep_id: str, name: str, night: str) -> None:
    for table, kinds in _tables(records.connection).items():
        columns = ",".join(f'"{column}"' for column in kinds if column != "sweep_id")
        records.connection.execute(
            f'INSERT INTO "{table}" (sweep_id,{columns}) SELECT ?,{columns} FROM "{table}" WHERE sweep_id=?', (name, sweep_id)
        )
    records.connection.execute("UPDATE sweep SET environment=json_set(environment, '$.night', ?) WHERE sweep_id=?", (night, name))


@pytest.fixture(scope="module")
def submit(home: Home, inbox: tuple[str, list[dict[str, Any]]]) -> Iterator[Any]:
    """Submits a night to a head of this module, as the README says."""
    folder = Path(tempfile.mkdtemp(prefix="cplab-", dir="/tmp"))  # Ray's sockets need a short path
    gcs, dashboard = free_port(), free_port()
    env = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", TRACKING_ENV_VAR, HOME_ENV_VAR)} | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
        URL_ENV_VAR: inbox[0],
        "no_proxy": "127.0.0.1",
    }
    ray = [sys.executable, "-m", "ray.scripts.scripts"]
    start = ["start", "--head", "--block", "--num-cpus=2", "--node-ip-address=127.0.0.1", f"--port={gcs}", f"--temp-dir={folder}"]
    ports = [f"--{name}-port={free_port()}" for name in ("ray-client-server", "dashboard-agent-listen", "metrics-export")]
    ports += [f"--dashboard-port={dashboard}", "--min-worker-port=0", "--max-worker-port=0"]
    log = (folder / "head.log").open("w")
    memory = "--object-store-memory=100000000"
    # pytest's own timeout ends it the hard way and runs no fixture's end: the head then ends with it.
    guard = ["setpriv", "--pdeathsig", "TERM"] if shutil.which("setpriv") else []
    head = subprocess.Popen([*guard, *ray, *start, *ports, memory], env=env, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
    environment = yaml.safe_load((ROOT / "service" / "deploy" / "job.yaml").read_text())
    environment["env_vars"][HOME_ENV_VAR] = str(home.folder)
    (folder / "job.yaml").write_text(yaml.safe_dump(environment))
    checkout = folder / "checkout"  # what else lies in ours is not to be uploaded
    for floor in ("experiments", "workers", "service"):
        shutil.copytree(ROOT / floor, checkout / floor, ignore=shutil.ignore_patterns("__pycache__"))

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        deadline_s = time.monotonic() + 60
        while True:
            done = submitted(*words)
            if "No available agent" not in done.stderr or time.monotonic() > deadline_s:
                return done
            time.sleep(0.5)  # the head answers before its agent, which starts jobs, is there

    def submitted(*words: str) -> subprocess.CompletedProcess[str]:
        command = [*ray, "job", "submit", "--working-dir", ".", "--runtime-env", str(folder / "job.yaml"), "--"]
        return subprocess.run(
            [*command, "python", "-m", "service", "nightly", *words],
            cwd=checkout,
            env=env | {"RAY_ADDRESS": f"http://127.0.0.1:{dashboard}"},
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )

    try:
        wait_until_up(dashboard, env["RAY_AUTH_TOKEN"], head, folder / "head.log")
        yield run
    finally:
        ours = psutil.Process(head.pid).children(recursive=True) if head.poll() is None else []
        head.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            head.wait(10)
        for process in ours:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        head.kill()
        head.wait()
        log.close()
        shutil.rmtree(folder, ignore_errors=True)


def wait_until_up(port: int, token: str, head: subprocess.Popen[bytes], log: Path) -> None:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/api/jobs/", headers={"Authorization": f"Bearer {token}"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline_s = time.monotonic() + 60
    while True:
        assert head.poll() is None and time.monotonic() < deadline_s, log.read_text()[-2000:]
        with contextlib.suppress(OSError):
            opener.open(request, timeout=5).close()
            return
        time.sleep(0.2)


def test_a_submitted_night_succeeds_or_fails_and_tells_once(
    submit: Any, home: Home, inbox: tuple[str, list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, taken = inbox
    quiet = submit(*NIGHT, "--night", "2026-01-07", "--on", "always")
    assert quiet.returncode == 0, quiet.stdout + quiet.stderr
    assert ": FINE: " in quiet.stdout
    assert [message["text"].partition(": ")[0] for message in taken] == ["CP Lab nightly 2026-01-07"]

    slower = submit(*NIGHT, *SLOWED, "--night", "2026-01-08")
    assert slower.returncode == 1, slower.stdout + slower.stderr
    assert ": REGRESSION: overlapped in " in slower.stdout
    assert "suspect code" in slower.stdout
    assert [message["text"].split(": ")[1] for message in taken] == ["FINE", "REGRESSION"]

    # Whatever starts it again, a scheduler or a person, gets the same answer, and nobody gets a second message.
    for name, value in ((HOME_ENV_VAR, str(home.folder)), (URL_ENV_VAR, url), ("no_proxy", "127.0.0.1")):
        monkeypatch.setenv(name, value)
    again = CliRunner().invoke(app, ["nightly", *NIGHT, *SLOWED, "--night", "2026-01-08", "--on", "always"])
    assert again.exit_code == 1, again.output
    assert "is there already" in again.output and "has this night's message already" in again.output
    assert len(taken) == 2
    with contextlib.closing(NightStore(home.folder)) as store:
        assert [outcome.status for outcome in store.outcomes()] == ["FINE", "REGRESSION"]
