"""The dashboard: MLflow's own server on loopback over the embedded store, in the foreground until Ctrl-C."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import webbrowser
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import IO

from experiments.errors import UserError
from service.errors import InfrastructureError
from service.store.home import HOME_ENV_VAR, TRACKING_ENV_VAR, Home
from service.store.mlflow_store import SUITE_TAG, configure_mlflow, explain, failures, is_remote, lock_path, shown
from service.store.view import View, view_links, write_views

START_TIMEOUT_S = 120
STOP_TIMEOUT_S = 10
LOCK_TIMEOUT_S = 20
"""A publication holds the store's lock for seconds."""

_LOCAL = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Loopback is never asked for through a proxy."""


def experiment_link(uri: str, experiment_id: str) -> str:
    """Straight to the runs: without the workflow type MLflow opens an empty page for traces."""
    return f"{uri.rstrip('/')}/#/experiments/{experiment_id}/runs?workflowType=machine_learning"


def serve(home: Home, port: int, host: str = "127.0.0.1", open_browser: bool = False) -> None:
    """Serves until Ctrl-C or SIGTERM; prints the links of every suite's prepared views once the server answers.

    Args:
        open_browser: Opens the first of them, too.

    Raises:
        UserError: A server holds the results already, there are none, or the port is taken.
        InfrastructureError: The server did not come up, or ended by itself.
    """
    uri = home.tracking_uri
    if is_remote(uri):
        link = f"{shown(uri).rstrip('/')}/#/experiments"
        raise UserError(f"{TRACKING_ENV_VAR}: the results are on a server, which has its own dashboard: {link}")
    if home.is_embedded and not (home.folder / "mlflow.db").exists():
        after = "`cplab sync` publishes them" if home.records.exists() else "`cplab run quickstart` makes some"
        raise UserError(f"{HOME_ENV_VAR}: nothing has been published to {str(home.folder)!r} yet; {after}")
    _refuse_taken_port(host, port)
    log = home.folder / "dashboard.log"
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    with _ctrl_c_on_sigterm(), log.open("wb") as output:
        try:
            with _server(home, port, host, output) as server:
                prepared = _prepared(home)
                _wait_until_up(server, address, log)
                links = [line for suite in _suites(address) for line in _links(address, *suite, prepared.get(suite[1], []))]
                for words, link in links:
                    print(f"{words}: {link}", flush=True)
                if open_browser and links:
                    webbrowser.open(links[0][1])
                print(f"Ctrl-C ends it; its log is {log}", flush=True)
                code = server.wait()
        except KeyboardInterrupt:
            return
    raise _failure(f"ended by itself with exit code {code}", log)


def _prepared(home: Home) -> dict[str, list[View]]:
    """Experiment id -> its views, brought up to date, while the server comes up. Without them there is still the plain table."""
    import filelock
    from mlflow.tracking import MlflowClient

    from service.store.night_status import publish_statuses

    views: dict[str, list[View]] = {}
    try:
        with filelock.FileLock(lock_path(home), LOCK_TIMEOUT_S):
            client = MlflowClient(tracking_uri=home.tracking_uri)
            for experiment in client.search_experiments(filter_string=f"tags.`{SUITE_TAG}` LIKE '%'"):
                publish_statuses(client, experiment.experiment_id, home)
                views[experiment.experiment_id] = write_views(client, experiment.experiment_id)
    except failures() as error:
        print(f"the prepared views are not up to date: {explain(home.tracking_uri, error)}", file=sys.stderr, flush=True)
    return views


def _links(address: str, suite: str, experiment_id: str, views: list[View]) -> list[tuple[str, str]]:
    """(what it shows, link): of the prepared views, or of the plain table where a suite has none."""
    if not views:
        return [(suite, experiment_link(address, experiment_id))]
    return [(f"{suite}, {words}", link) for words, link in view_links(address, experiment_id, views)]


def _failure(what: str, log: Path) -> InfrastructureError:
    lines = log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
    return InfrastructureError(f"the dashboard's server {what}: {lines[-1].strip()}; see {log}")


def _refuse_taken_port(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a connection that is just closing does not take it
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(f"--port: {host}:{port} cannot be listened on: {error.strerror}; give another") from None


@contextlib.contextmanager
def _server(home: Home, port: int, host: str, output: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """MLflow's server and its workers, in a session of their own so that all of them end with us."""
    configure_mlflow()
    # Artifacts of our runs are read from their explicit place; the destination is for runs that others log through this server.
    store = ["--backend-store-uri", home.tracking_uri, "--artifacts-destination", home.artifacts.as_uri()]
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", *store, "--host", host, "--port", str(port), "--workers", "1"],
        # Its job runner is eight more processes and 2 GB for nothing that we use.
        env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        stdout=output,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        cwd=home.folder,
        start_new_session=True,
    )
    try:
        yield server
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(STOP_TIMEOUT_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def _wait_until_up(server: subprocess.Popen[bytes], address: str, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise _failure("ended before it answered", log)
        with contextlib.suppress(OSError), _LOCAL.open(f"{address}/health", timeout=5):
            return
        time.sleep(0.1)
    raise _failure(f"did not answer in {START_TIMEOUT_S} s", log)


def _suites(address: str) -> list[tuple[str, str]]:
    """Name and id of every experiment but MLflow's own."""
    with _LOCAL.open(f"{address}/api/2.0/mlflow/experiments/search?max_results=1000", timeout=30) as answer:
        found = json.load(answer).get("experiments", [])
    return sorted((experiment["name"], experiment["experiment_id"]) for experiment in found if experiment["experiment_id"] != "0")


@contextlib.contextmanager
def _ctrl_c_on_sigterm() -> Iterator[None]:
    """SIGTERM ends us as Ctrl-C does, so that the server never outlives us."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: int | FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
