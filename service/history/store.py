"""The nights' own file under CPLAB_HOME: points worked out once, how nights ended, who was told, what was blessed.

Nothing in it was measured: without it the points are worked out again from the records, except of nights whose samples `cplab gc` has removed.
"""

from __future__ import annotations

import json
import sqlite3
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from experiments.errors import UserError
from service.history.series import Key, Kind, NightPoints, Point, Value

FILE_NAME = "nights.db"
SCHEMA_VERSION = 1

_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS points (sweep_id TEXT PRIMARY KEY, night TEXT NOT NULL, points TEXT NOT NULL)",
    "CREATE TABLE IF NOT EXISTS outcome (experiment TEXT NOT NULL, night TEXT NOT NULL, sweep_id TEXT NOT NULL, status TEXT NOT NULL, "
    "exit_code INTEGER NOT NULL, summary TEXT NOT NULL, ended_s REAL NOT NULL, PRIMARY KEY (experiment, night))",
    "CREATE TABLE IF NOT EXISTS message (experiment TEXT NOT NULL, night TEXT NOT NULL, attempts INTEGER NOT NULL, delivered_s REAL, "
    "PRIMARY KEY (experiment, night))",
    "CREATE TABLE IF NOT EXISTS blessing (id INTEGER PRIMARY KEY, experiment TEXT NOT NULL, night TEXT NOT NULL, sweep_id TEXT NOT NULL, "
    "why TEXT NOT NULL, who TEXT NOT NULL, blessed_s REAL NOT NULL)",
)


@dataclass(frozen=True)
class Outcome:
    """How a night ended. `summary` is what was written as JSON."""

    experiment: str
    night: str
    sweep_id: str
    status: str
    exit_code: int
    summary: dict[str, Any]


@dataclass(frozen=True)
class Blessing:
    """One entry of the log."""

    night: str
    sweep_id: str
    why: str
    who: str
    blessed_s: float


class NightStore:
    """One open file; safe to open from several processes."""

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            UserError: It cannot be opened, or is of a later version.
        """
        path = folder / FILE_NAME
        try:
            self._db = sqlite3.connect(path, timeout=30, isolation_level=None)
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, SCHEMA_VERSION):
                raise UserError(f"CPLAB_HOME: {str(path)!r} is of schema {version}, this version reads {SCHEMA_VERSION}")
            self._db.execute("PRAGMA journal_mode=WAL")
            for statement in _SCHEMA:
                self._db.execute(statement)
            self._db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
        except sqlite3.Error as error:
            raise UserError(f"CPLAB_HOME: {str(path)!r} cannot be opened: {error}") from None

    def close(self) -> None:
        self._db.close()

    # Points.

    def points(self, sweep_id: str) -> NightPoints | None:
        """A night's points, when they were worked out before."""
        row = self._db.execute("SELECT night, points FROM points WHERE sweep_id=?", (sweep_id,)).fetchone()
        if row is None:
            return None
        night = str(row[0])
        return NightPoints(night, sweep_id, tuple(_row_of(values, night, sweep_id) for values in json.loads(row[1])))

    def keep_points(self, points: NightPoints) -> None:
        rows = [
            [key.setting, key.cell_id, key.arm, label, {kind: asdict(value) for kind, value in point.values.items()}]
            for key, label, point in points.rows
        ]
        self._db.execute("INSERT OR REPLACE INTO points VALUES (?,?,?)", (points.sweep_id, points.night, json.dumps(rows)))

    # Outcomes and messages.

    def outcome(self, experiment: str, night: str) -> Outcome | None:
        query = "SELECT sweep_id, status, exit_code, summary FROM outcome WHERE experiment=? AND night=?"
        row = self._db.execute(query, (experiment, night)).fetchone()
        return None if row is None else Outcome(experiment, night, row[0], row[1], row[2], json.loads(row[3]))

    def outcome_before(self, experiment: str, night: str) -> Outcome | None:
        """The last night before that one."""
        query = "SELECT night FROM outcome WHERE experiment=? AND night<? ORDER BY night DESC LIMIT 1"
        row = self._db.execute(query, (experiment, night)).fetchone()
        return None if row is None else self.outcome(experiment, str(row[0]))

    def keep_outcome(self, outcome: Outcome) -> None:
        self._db.execute(
            "INSERT OR REPLACE INTO outcome VALUES (?,?,?,?,?,?,?)",
            (
                outcome.experiment,
                outcome.night,
                outcome.sweep_id,
                outcome.status,
                outcome.exit_code,
                json.dumps(outcome.summary),
                time.time(),
            ),
        )

    def outcomes(self) -> list[Outcome]:
        """Of every night of every experiment."""
        rows = self._db.execute(
            "SELECT experiment, night, sweep_id, status, exit_code, summary FROM outcome ORDER BY experiment, night"
        )
        return [Outcome(row[0], row[1], row[2], row[3], row[4], json.loads(row[5])) for row in rows]

    def is_told(self, experiment: str, night: str) -> bool:
        """Whether the night's one message was taken."""
        query = "SELECT delivered_s FROM message WHERE experiment=? AND night=?"
        row = self._db.execute(query, (experiment, night)).fetchone()
        return row is not None and row[0] is not None

    def keep_message(self, experiment: str, night: str, attempts: int, is_delivered: bool) -> None:
        self._db.execute(
            "INSERT INTO message VALUES (?,?,?,?) ON CONFLICT (experiment, night) DO UPDATE SET "
            "attempts = attempts + excluded.attempts, delivered_s = COALESCE(delivered_s, excluded.delivered_s)",
            (experiment, night, attempts, time.time() if is_delivered else None),
        )

    # Blessings: only ever added to.

    def bless(self, experiment: str, blessing: Blessing) -> None:
        self._db.execute(
            "INSERT INTO blessing (experiment, night, sweep_id, why, who, blessed_s) VALUES (?,?,?,?,?,?)",
            (experiment, blessing.night, blessing.sweep_id, blessing.why, blessing.who, blessing.blessed_s),
        )

    def blessings(self, experiment: str) -> list[Blessing]:
        """The log, newest first: its first entry is where the tag is."""
        rows = self._db.execute(
            "SELECT night, sweep_id, why, who, blessed_s FROM blessing WHERE experiment=? ORDER BY id DESC", (experiment,)
        )
        return [Blessing(*row) for row in rows]

    def blessed_sweeps(self) -> set[str]:
        """Every sweep of the log, of any experiment: also those that the tag has left."""
        return {str(row[0]) for row in self._db.execute("SELECT sweep_id FROM blessing")}


def _row_of(values: list[Any], night: str, sweep_id: str) -> tuple[Key, str, Point]:
    setting, cell_id, arm, label, figures = values
    point = Point(night, sweep_id, {Kind(kind): Value(**value) for kind, value in figures.items()})
    return Key(setting, cell_id, arm), label, point
