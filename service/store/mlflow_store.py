"""The MLflow store: which one, made once, reached quickly or not at all. The only room that knows MLflow's own traps.

MLflow is imported inside functions: it takes more than a second, which `cplab --help` must not pay.
"""

from __future__ import annotations

import os
import re
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.store.home import Home

SUITE_TAG = "cplab.suite"
REQUEST_TIMEOUT_S = 10
REQUEST_RETRIES = 2

_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # By default an unreachable server is asked 8 times for up to 120 s each: a run would end minutes after its result.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": str(REQUEST_TIMEOUT_S),
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": str(REQUEST_RETRIES),
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    # One GET a run and two lines on stdout for each of them otherwise.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
}


class TrackingError(Exception):
    """The tracking store cannot be reached, or failed. One line; nothing of the measurement is lost by it."""


@dataclass(frozen=True)
class TrackingStore:
    """An open store and the suite's experiment in it."""

    client: Any
    experiment_id: str
    is_remote: bool


def configure_mlflow() -> None:
    """Settings for MLflow in this process; what the user has set stays. Call it before MLflow is imported."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)


def is_remote(uri: str) -> bool:
    """Whether a server stands between us and the store; it then owns the artifacts' place, too."""
    return uri.startswith(("http://", "https://", "databricks"))


def shown(text: str) -> str:
    """The text without the user and password of any URI in it."""
    return re.sub(r"//[^/@\s]+@", "//***@", text)


def lock_path(home: Home) -> Path:
    """The lock that whoever makes or fills the store holds: two drivers may end at the same moment."""
    return home.folder / "mlflow.lock"


def failures() -> tuple[type[BaseException], ...]:
    """Everything that a store may raise when it, and not our code, is at fault."""
    import filelock
    import requests
    from alembic.util.exc import CommandError
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return (MlflowException, requests.RequestException, SQLAlchemyError, CommandError, sqlite3.Error, OSError, filelock.Timeout)


def explain(uri: str, error: BaseException) -> TrackingError:
    """One line that says which store and why."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    reason = lines[0]
    for words, said in (
        ("Connection refused", "connection refused: is the server up?"),
        ("Name or service not known", "its host name is unknown"),
        ("Temporary failure in name resolution", "its host name cannot be resolved"),
        ("timed out", f"no answer in time (MLFLOW_HTTP_REQUEST_TIMEOUT={os.environ.get('MLFLOW_HTTP_REQUEST_TIMEOUT')} s)"),
    ):
        if is_remote(uri) and any(words in str(link) for link in chain):
            reason = said
            break
    return TrackingError(shown(f"MLflow at {uri}: {reason[:400]}"))


def open_store(home: Home, suite: str) -> TrackingStore:
    """The store with the suite's experiment, both made when they are not there. Hold the lock.

    Raises:
        TrackingError: It is out of reach, or its experiment was deleted. Other `failures()` pass through.
    """
    uri = home.tracking_uri
    configure_mlflow()
    if not is_remote(uri):
        _make_database(uri, home.artifacts)
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    return TrackingStore(client, _experiment_id(client, uri, suite, home.artifacts), is_remote(uri))


def _make_database(uri: str, artifacts: Path) -> None:
    """Proves that a database is there, making an SQLite one when it is not.

    MLflow itself would try ten times, for minutes, to open a database that cannot be opened. And it fills a new file table by
    table: a driver killed then leaves one that no later MLflow opens. So it is filled under another name.
    """
    import sqlalchemy

    path = sqlite_path(uri)
    if path is None:
        if uri.startswith("file:") or "://" not in uri:
            raise TrackingError(
                f"MLFLOW_TRACKING_URI: {uri!r} is a folder; MLflow keeps runs in databases: use sqlite:////path/mlflow.db"
            )
        try:
            engine = sqlalchemy.create_engine(uri)
        except ImportError as error:
            raise TrackingError(shown(f"MLflow at {uri}: its database needs a driver: {error}")) from None
        try:
            engine.connect().close()
        finally:
            engine.dispose()
        return
    if path.exists():
        probe = sqlite3.connect(path, timeout=10)
        try:
            probe.execute("SELECT count(*) FROM sqlite_master").fetchone()
        finally:
            probe.close()
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    unfinished = path.with_name(f"{path.name}.unfinished")
    for leftover in path.parent.glob(f"{unfinished.name}*"):
        leftover.unlink()
    # Its artifact root becomes that of MLflow's own `Default` experiment, which would otherwise be the working directory.
    store = SqlAlchemyStore(f"sqlite:///{unfinished}", artifacts.as_uri())
    store.engine.dispose()
    unfinished.replace(path)


def sqlite_path(uri: str) -> Path | None:
    """The file of an SQLite store; None for a store of another kind."""
    import sqlalchemy

    if not uri.startswith("sqlite:"):
        return None
    database = sqlalchemy.make_url(uri).database
    return Path(database).absolute() if database else None


def _experiment_id(client: Any, uri: str, suite: str, artifacts: Path) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(suite)
    if found is None:
        # A suite may hold slashes and dots; its folder must stay one folder below ours.
        folder = artifacts / re.sub(r"[^A-Za-z0-9_-]+", "_", suite)
        location = None if is_remote(uri) else folder.as_uri()
        try:
            return str(client.create_experiment(suite, artifact_location=location, tags={SUITE_TAG: suite}))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(suite)  # another driver's, made in this moment
    if found.lifecycle_stage != "active":
        restore = f"mlflow experiments restore -x {found.experiment_id}"
        raise TrackingError(shown(f"MLflow at {uri}: experiment {suite!r} was deleted there; to have it back: `{restore}`"))
    return str(found.experiment_id)
