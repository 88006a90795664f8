"""The dashboard: refused when it makes no sense, and really serving runs with their artifacts."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import filelock
import pytest

from experiments.errors import UserError
from service.store import dashboard as dashboard_room
from service.store.dashboard import experiment_link, serve
from service.store.home import TRACKING_ENV_VAR, Home
from service.store.mlflow_store import lock_path
from service.store.tracking import publish
from service.store.view import LAST, VIEW_TAG, view_link
from tests.service.synthetic import home_in, make_spec, make_sweep

ROOT = Path(__file__).resolve().parents[2]
DRIVER = "import sys; from pathlib import Path; from service.store.dashboard import serve; from service.store.home import Home; "


@pytest.fixture(autouse=True)
def _embedded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TRACKING_ENV_VAR, raising=False)


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def published(tmp_path: Path) -> Home:
    home = home_in(tmp_path / "home")
    records, result = make_sweep(home, make_spec())
    publish(records, result.sweep_id, result, home)
    records.close()
    return home


def test_nothing_published_yet_is_refused(tmp_path: Path, free_port: int) -> None:
    with pytest.raises(UserError, match="cplab run quickstart"):
        serve(home_in(tmp_path / "home"), free_port)
    home = home_in(tmp_path / "unpublished")
    make_sweep(home, make_spec())
    with pytest.raises(UserError, match="cplab sync"):
        serve(home, free_port)


def test_a_taken_port_is_refused(tmp_path: Path) -> None:
    home = home_in(tmp_path / "home")
    (home.folder / "mlflow.db").touch()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--port: 127.0.0.1:{port}"):
            serve(home, port)


def test_a_server_elsewhere_is_named_without_its_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free_port: int
) -> None:
    monkeypatch.setenv(TRACKING_ENV_VAR, "http://me:secret@tracker.example:5000/")
    with pytest.raises(UserError, match=r"tracker\.example:5000/#/experiments") as caught:
        serve(home_in(tmp_path / "home"), free_port)
    assert "secret" not in str(caught.value)


@pytest.fixture
def dashboard(published: Home, free_port: int) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process that serves, and what it printed by the time it was up."""
    # Whoever runs the tests in the background has Ctrl-C ignored, and children inherit that.
    code = f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n{DRIVER}serve(Home(Path(sys.argv[1])), int(sys.argv[2]))"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(published.folder), str(free_port)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    try:
        yield process, process.stdout.readline()
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)
        process.stdout.close()


def test_it_serves_runs_and_their_artifacts_and_ends_with_ctrl_c(
    dashboard: tuple[subprocess.Popen[str], str], published: Home
) -> None:
    process, line = dashboard
    found = re.fullmatch(
        r"nsa-indexer, \d{4}-\d\d-\d\d planted: ((http://127\.0\.0\.1:\d+)/#/experiments/(\d+)/runs\?.*)\n", line
    )
    assert found, line
    link, address, experiment_id = found.groups()
    assert link == view_link(address, experiment_id, LAST)
    assert link.startswith(experiment_link(address, experiment_id))

    def ask(path: str, body: object = None) -> bytes:
        request = urllib.request.Request(f"{address}{path}", method="GET" if body is None else "POST")
        data = None if body is None else json.dumps(body).encode()
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, data, timeout=30) as answer:
            return bytes(answer.read())

    experiment = json.loads(ask(f"/api/2.0/mlflow/experiments/get?experiment_id={experiment_id}"))["experiment"]
    assert f"{VIEW_TAG}{LAST}" in {tag["key"] for tag in experiment["tags"]}
    runs = json.loads(ask("/api/2.0/mlflow/runs/search", {"experiment_ids": [experiment_id], "max_results": 100}))["runs"]
    assert len(runs) == 5
    names = {run["info"]["run_id"]: run["info"]["run_name"] for run in runs}
    (arm_id,) = [i for i, name in names.items() if name == "overlapped-new64-cp2-zigzag-emulated_20mbit"]
    listed = json.loads(ask(f"/api/2.0/mlflow/artifacts/list?run_id={arm_id}"))["files"]
    assert {f["path"] for f in listed} == {"samples.parquet", "spec.yaml", "environment.json"}
    (local,) = published.artifacts.rglob(f"{arm_id}/artifacts/samples.parquet")
    assert ask(f"/get-artifact?run_id={arm_id}&path=samples.parquet") == local.read_bytes()

    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            ask("/health")
        except (urllib.error.URLError, ConnectionError):
            break
        time.sleep(0.1)
    else:
        pytest.fail("the server outlived its dashboard")
    assert not (published.folder / "mlruns").exists()


def test_without_views_there_is_still_the_plain_table(
    published: Home, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where another's publication holds the store's lock."""
    monkeypatch.setattr(dashboard_room, "LOCK_TIMEOUT_S", 0.1)
    with filelock.FileLock(lock_path(published)):
        assert dashboard_room._prepared(published) == {}
    assert "the prepared views are not up to date" in capsys.readouterr().err
    (words, link), *more = dashboard_room._links("http://127.0.0.1:5000", "nsa-indexer", "1", [])
    assert (words, link, more) == ("nsa-indexer", experiment_link("http://127.0.0.1:5000", "1"), [])
