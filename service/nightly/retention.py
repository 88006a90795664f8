"""Retention: traces and samples that are old enough to go, and those that never do.

A sweep keeps its spec, environment, checks, spans and faults for ever; what goes is what takes room. It goes from all three places: the tracking
store's artifacts first, then the files, then the rows, so that whatever ends us in between leaves a sweep that the next call takes up again.
Sweeps that regressed, and the good ones that they are held against, stay whole, as do blessed ones and what is not in MLflow yet.
"""

from __future__ import annotations

import shutil
import time
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from experiments.names import SweepStatus
from service.history.nights import NIGHT, keep_points
from service.history.store import NightStore
from service.nightly.verdict import NightStatus
from service.store.extract import FILE_NAME as EXTRACT_FILE
from service.store.home import Home
from service.store.records import SAMPLES_REMOVED, Records
from service.store.schema import Transaction
from service.store.trace_files import EVENTS_FILE

DAY_S = 86_400.0
SAMPLES_FILE = "samples.parquet"

FolderOf = Callable[[str], Sequence[Path]]
"""sweep_id -> the folders of its runs' artifacts that are ours to empty."""


class What(StrEnum):
    """What may be removed."""

    TRACES = "traces"
    SAMPLES = "samples"


ARTIFACTS = {What.TRACES: (EVENTS_FILE,), What.SAMPLES: (SAMPLES_FILE, EXTRACT_FILE)}
"""Files of a run that go; the page, the pictures and the result stay."""

TABLES = {What.TRACES: ("trace",), What.SAMPLES: ("trial", "device_state")}


@dataclass(frozen=True)
class Piece:
    """The traces or the samples of one sweep.

    Attributes:
        night: Its name when it is one.
        num_bytes: In the records and files; what SQLite adds is not counted.
    """

    what: What
    sweep_id: str
    experiment: str
    night: str
    age_days: float
    num_bytes: int


@dataclass(frozen=True)
class Plan:
    """What is to go. `kept`: why -> old sweeps that stay for it."""

    pieces: tuple[Piece, ...]
    kept: Mapping[str, int]


def plan_retention(records: Records, store: NightStore, home: Home, days: Mapping[What, float], folder_of: FolderOf) -> Plan:
    """What of this home is older than its `days`. Reads only."""
    protected, now_s = _protected(store), time.time()
    pieces, kept = [], Counter[str]()
    rows = records.connection.execute(
        "SELECT sweep_id, experiment, status, ended_s, published_uri, json_extract(environment, ?) AS night FROM sweep ORDER BY started_s",
        (f"$.{NIGHT}",),
    ).fetchall()
    for row in rows:
        sweep_id = str(row["sweep_id"])
        if row["status"] == SweepStatus.RUNNING or row["ended_s"] is None:
            continue
        age_days = (now_s - row["ended_s"]) / DAY_S
        found = [
            Piece(what, sweep_id, str(row["experiment"]), str(row["night"] or ""), age_days, size)
            for what, limit in days.items()
            if age_days > limit and (size := _rows_bytes(records, sweep_id, what)) is not None
        ]
        if not found:
            continue
        why = protected.get(sweep_id) or ("" if row["published_uri"] else "not in MLflow yet: `cplab sync`")
        if why:
            kept[why] += 1
            continue
        pieces += [_with_files(piece, home, folder_of) for piece in found]
    return Plan(tuple(pieces), kept)


def _protected(store: NightStore) -> dict[str, str]:
    """sweep_id -> why it stays whole."""
    found = {}
    for outcome in store.outcomes():
        if outcome.status == NightStatus.REGRESSION:
            found[outcome.sweep_id] = "regressed"
        for finding in outcome.summary.get("findings", []):
            if finding["is_worse"]:
                found.setdefault(finding["last_good"]["sweep_id"], "beside a regressed one")
                found[finding["first_bad"]["sweep_id"]] = "regressed"
    return found | dict.fromkeys(store.blessed_sweeps(), "blessed")


def _rows_bytes(records: Records, sweep_id: str, what: What) -> int | None:
    """Size of the rows that would go; None where there are none."""
    column = {"trace": "reports", "trial": "ranks", "device_state": "states"}
    sizes = [
        records.connection.execute(f"SELECT SUM(LENGTH({column[table]})) FROM {table} WHERE sweep_id=?", (sweep_id,)).fetchone()[
            0
        ]
        for table in TABLES[what]
    ]
    there = [int(size) for size in sizes if size is not None]
    return sum(there) if there else None


def _files(piece: Piece, home: Home, folder_of: FolderOf) -> list[Path]:
    files = [folder / name for folder in folder_of(piece.sweep_id) for name in ARTIFACTS[piece.what]]
    if piece.what is What.TRACES:
        files += sorted(path for path in (home.traces / piece.sweep_id).rglob("*") if path.is_file())
    return [file for file in files if file.is_file()]


def _with_files(piece: Piece, home: Home, folder_of: FolderOf) -> Piece:
    size = sum(file.stat().st_size for file in _files(piece, home, folder_of))
    return Piece(piece.what, piece.sweep_id, piece.experiment, piece.night, piece.age_days, piece.num_bytes + size)


def remove(records: Records, store: NightStore, home: Home, piece: Piece, folder_of: FolderOf) -> None:
    """Removes a piece; a night's figures in the history are worked out before, and stay."""
    if piece.what is What.SAMPLES:
        keep_points(records, store, piece.sweep_id)
    for file in _files(piece, home, folder_of):
        file.unlink(missing_ok=True)
    if piece.what is What.TRACES:
        shutil.rmtree(home.traces / piece.sweep_id, ignore_errors=True)
    db = records.connection
    with Transaction(db):
        for table in TABLES[piece.what]:
            db.execute(f"DELETE FROM {table} WHERE sweep_id=?", (piece.sweep_id,))
        if piece.what is What.SAMPLES:
            marked = "UPDATE sweep SET environment=json_set(environment, ?, date('now')) WHERE sweep_id=?"
            db.execute(marked, (f"$.{SAMPLES_REMOVED}", piece.sweep_id))


def give_back_room(records: Records) -> None:
    """Makes the file as small as what it holds; it is locked for as long as that takes."""
    records.connection.execute("VACUUM")
    records.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def artifact_folders(home: Home, uris: Sequence[str]) -> list[Path]:
    """Those of these places that are folders of this home's own: a server's artifacts are the server's."""
    parts = [urllib.parse.urlsplit(uri) for uri in uris]
    folders = [Path(urllib.request.url2pathname(part.path)) for part in parts if part.scheme == "file"]
    return [folder for folder in folders if folder.resolve().is_relative_to(home.artifacts.resolve())]
