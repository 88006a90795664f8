"""Where a sweep is read from: the records of this home, or MLflow alone, for people who sit elsewhere."""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.errors import UserError
from service.errors import InfrastructureError
from service.store.extract import FILE_NAME, records_of
from service.store.home import Home
from service.store.mlflow_store import TrackingError, configure_mlflow, explain, failures, shown, sqlite_path
from service.store.planned_run import COMPLETE_TAG
from service.store.records import LAST, Records, UnknownSweepError, choose_sweep
from service.store.trace_files import PICTURE_FILE

_WORD = re.compile(r"[\w-]{1,64}")


@dataclass(frozen=True)
class Source:
    """An open sweep.

    Attributes:
        records: Hold the sweep, and perhaps others.
        read_from: Said to the reader.
        lanes_png: The picture of the lanes, when a trace was taken.
    """

    records: Records
    sweep_id: str
    read_from: str
    lanes_png: bytes | None = None


@contextlib.contextmanager
def open_sweep(home: Home, word: str, from_mlflow: bool = False) -> Iterator[Source]:
    """The sweep that `word` means (an id, a prefix of one, `last`): from the records, or from MLflow when they do not know it.

    Raises:
        UserError: No sweep or several, or a file that cannot be judged.
        InfrastructureError: The tracking store is out of reach, and the records do not know the sweep.
    """
    if not _WORD.fullmatch(word):
        raise UserError(f"SWEEP: {word!r} is no sweep: give an id, a prefix of one, or {LAST!r}")
    try:
        source = _from_mlflow(home, word) if from_mlflow else _from_records(home, word)
    except TrackingError as error:
        raise InfrastructureError(str(error)) from error
    except UnknownSweepError as unknown:
        if from_mlflow or _is_empty(home):
            raise
        try:
            source = _from_mlflow(home, word)
        except UnknownSweepError as too:
            raise UnknownSweepError(f"{unknown}; and {str(too).removeprefix('SWEEP: ')}") from None
        except TrackingError as error:
            raise InfrastructureError(f"{unknown}; and {error}") from error
    try:
        yield source
    finally:
        source.records.close()


def _from_records(home: Home, word: str) -> Source:
    records = Records(home.records)
    try:
        sweep_id = records.find(word)
    except UserError:
        records.close()
        raise
    return Source(records, sweep_id, f"the records at {home.records}", lanes_of(home, sweep_id))


def lanes_of(home: Home, sweep_id: str) -> bytes | None:
    """The picture of the lanes of a sweep's first traced cell."""
    picture = next(iter(sorted((home.traces / sweep_id).glob(f"*/{PICTURE_FILE}"))), None)
    return picture.read_bytes() if picture is not None else None


def _is_empty(home: Home) -> bool:
    """Whether there is no tracking store to ask: asking would make one."""
    path = sqlite_path(home.tracking_uri)
    return path is not None and not path.exists()


def _from_mlflow(home: Home, word: str) -> Source:
    configure_mlflow()
    uri = home.tracking_uri
    if _is_empty(home):
        raise UserError(
            f"SWEEP: there is no tracking store at {shown(uri)}; set MLFLOW_TRACKING_URI to the one that has {word!r}"
        )
    try:
        return _fetch(uri, word)
    except failures() as error:
        raise explain(uri, error) from error


def _fetch(uri: str, word: str) -> Source:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    runs = _summaries(client, word)
    place = f"MLflow at {shown(uri)}"
    run_id = runs[choose_sweep(word, list(runs), place)]
    names = {artifact.path for artifact in client.list_artifacts(run_id)}
    if FILE_NAME not in names:
        raise UserError(f"SWEEP: the summary run of {word!r} in {place} has no {FILE_NAME}: an older version published it")
    with tempfile.TemporaryDirectory(prefix="cplab-fetch-") as folder:

        def fetch(name: str) -> bytes:
            return Path(client.download_artifacts(run_id, name, folder)).read_bytes()

        records, sweep_id = records_of(fetch(FILE_NAME))
        return Source(records, sweep_id, place, fetch(PICTURE_FILE) if PICTURE_FILE in names else None)


def _summaries(client: Any, word: str) -> dict[str, str]:
    """sweep_id -> run id of the complete summary runs that `word` may mean, newest first; the latest when it means none."""
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    complete = f"tags.role = 'summary' AND tags.`{COMPLETE_TAG}` = 'true'"
    meant = complete if word == LAST else f"{complete} AND tags.sweep_id LIKE '{word}%'"
    for condition in (meant, complete):
        runs = client.search_runs(experiments, condition, max_results=20, order_by=["attributes.start_time DESC"])
        if runs:
            break
    return {run.data.tags["sweep_id"]: run.info.run_id for run in runs}
