"""The records: everything that was measured, in SQLite, one transaction a block. What is here outlives the driver, Ray and MLflow.

WAL mode needs a local disk. Rows are keyed by what they are (sweep, cell, launch, kind, block), so a repeat replaces and never doubles.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Sequence
from dataclasses import asdict
from operator import attrgetter
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from experiments.errors import UserError
from experiments.names import METHODOLOGY_VERSION, SweepStatus
from experiments.spec.cell import Cell, steps_as_json
from experiments.spec.experiment import ExperimentSpec
from service.judge.results import CellRecord, shared_gpus
from service.judge.samples import Trial
from service.run.policy import Attempt
from service.run.tasks import Task
from service.store.schema import Transaction, open_records
from workers.device_state import DeviceState
from workers.messages import BlockReport, Fault, TraceReport, VerifyReport

RANK_FIELDS = ("elapsed_us", "start_us", "window_us", "gather_us", "wire_us", "arrival_us", "late_us", "filler_us", "enqueue_us")
"""What a trial keeps of every rank, in this order; rows of schema 1 end with `late_us`."""


_RANK_VALUES, _ARRIVAL = attrgetter(*RANK_FIELDS), RANK_FIELDS.index("arrival_us")
_DEVICE_STATES = TypeAdapter(list[DeviceState])
_TRACE_REPORTS = TypeAdapter(list[TraceReport])

EVIDENCE_CHARS = 20_000
"""Of an attempt's evidence: stacks of many ranks are long, and alike."""

SAMPLES_REMOVED = "samples_removed"
"""The key of a sweep's environment that says when `cplab gc` took its trials: it can not be judged any more, nor published."""

LAST = "last"
"""The word for the newest sweep."""


class UnknownSweepError(UserError):
    """No sweep of that name here; it may be elsewhere."""


class Records:
    """One file of records; safe to open from several processes."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            UserError: The file cannot be opened, is no record file, or is of another schema.
        """
        self.path = path
        self._db = open_records(path)

    def close(self) -> None:
        self._db.close()

    def _transaction(self) -> Transaction:
        return Transaction(self._db)

    # Writing, in the order of a sweep.

    def start_sweep(
        self,
        sweep_id: str,
        spec: ExperimentSpec,
        cells: Sequence[Cell],
        environment: dict[str, Any],
        replay: dict[str, Any] | None,
    ) -> None:
        """A sweep that is about to run."""
        spec_json = spec.model_dump_json()
        with self._transaction():
            self._db.execute(
                "INSERT INTO sweep (sweep_id, experiment, suite, spec, spec_hash, status, started_s, environment, replay, "
                "methodology_version) VALUES (?,?,?,?,?,?,?,?,?,?)",
                (
                    sweep_id,
                    spec.name,
                    spec.suite,
                    spec_json,
                    spec.spec_hash,
                    SweepStatus.RUNNING,
                    time.time(),
                    json.dumps(environment),
                    json.dumps(replay) if replay else None,
                    METHODOLOGY_VERSION,
                ),
            )
            for position, cell in enumerate(cells):
                self._db.execute(
                    "INSERT INTO cell (sweep_id, cell_id, position, cell, steps) VALUES (?,?,?,?,?)",
                    (sweep_id, cell.cell_id, position, json.dumps(cell.as_json()), json.dumps(steps_as_json(cell.steps))),
                )

    def add_launch(self, sweep_id: str, cp_size: int, launch: int, ranks: list[dict[str, Any]], launch_s: float) -> None:
        """A launch that has come up, with its rank -> (node, device) map."""
        with self._transaction():
            self._db.execute(
                "INSERT OR REPLACE INTO launch VALUES (?,?,?,?,?,?)",
                (sweep_id, cp_size, launch, json.dumps(ranks), launch_s, time.time()),
            )

    def set_path(self, sweep_id: str, cell_id: str, path: str, floor_us: float | None) -> None:
        """Which path really runs in a cell."""
        with self._transaction():
            self._db.execute(
                "UPDATE cell SET path=?, floor_us=? WHERE sweep_id=? AND cell_id=?", (path, floor_us, sweep_id, cell_id)
            )

    def add_verification(self, sweep_id: str, cell_id: str, launch: int, phase: str, reports: Sequence[VerifyReport]) -> None:
        with self._transaction():
            self._db.execute(
                "INSERT OR REPLACE INTO verification VALUES (?,?,?,?,?)",
                (sweep_id, cell_id, launch, phase, json.dumps([asdict(report) for report in reports])),
            )

    def add_settling(self, sweep_id: str, cell_id: str, launch: int, blocks: int, trend: float, is_settled: bool) -> None:
        """How a launch's warm-up of a cell ended; `trend` is a share of the time, infinite after a single block."""
        with self._transaction():
            self._db.execute(
                "INSERT OR REPLACE INTO settling VALUES (?,?,?,?,?,?)", (sweep_id, cell_id, launch, blocks, trend, is_settled)
            )

    def _unsettled(self, sweep_id: str, cell_id: str) -> int:
        query = "SELECT COUNT(*) FROM settling WHERE sweep_id=? AND cell_id=? AND NOT is_settled"
        return int(self._db.execute(query, (sweep_id, cell_id)).fetchone()[0])

    def add_spent(self, sweep_id: str, cell_id: str, cp_size: int, launch: int, action: str, block: int, took_s: float) -> None:
        """What a task took, seconds, with what it took before it was repeated; `cell_id` is empty for what concerns a whole group."""
        query = "INSERT INTO spent VALUES (?,?,?,?,?,?,?) ON CONFLICT DO UPDATE SET took_s = took_s + excluded.took_s"
        with self._transaction():
            self._db.execute(query, (sweep_id, cell_id, cp_size, launch, action, block, took_s))

    def spent(self, sweep_id: str) -> list[tuple[str, float]]:
        """(action, seconds) of every task of a sweep that ended."""
        rows = self._db.execute("SELECT action, took_s FROM spent WHERE sweep_id=?", (sweep_id,))
        return [(row["action"], row["took_s"]) for row in rows]

    def add_trace(self, sweep_id: str, cell_id: str, launch: int, reports: Sequence[TraceReport]) -> None:
        """A cell's traced trials, every rank's."""
        with self._transaction():
            self._db.execute(
                "INSERT OR REPLACE INTO trace VALUES (?,?,?,?)",
                (sweep_id, cell_id, launch, json.dumps([asdict(report) for report in reports])),
            )

    def add_faults(self, sweep_id: str, cell_id: str, faults: Sequence[Fault]) -> None:
        """The cell is INVALID from here on."""
        with self._transaction():
            self._db.executemany(
                "INSERT OR IGNORE INTO fault VALUES (?,?,?,?,?)", [(sweep_id, cell_id, f.arm, f.check, f.detail) for f in faults]
            )

    def begin_visit(self, sweep_id: str, cell_id: str, launch: int) -> None:
        """Blocks of this cell and launch are measured from here on; what another life of the ranks left of them goes."""
        with self._transaction():
            for table in ("block", "trial", "device_state", "verification", "settling", "trace"):
                self._db.execute(f"DELETE FROM {table} WHERE sweep_id=? AND cell_id=? AND launch=?", (sweep_id, cell_id, launch))

    def add_attempt(self, sweep_id: str, task: Task, attempt: Attempt) -> None:
        """A group was lost. Never replaced: the next one has the next number."""
        cell_id, cp_size, launch = task.visit
        told = (attempt.number, attempt.cause, attempt.evidence[:EVIDENCE_CHARS], attempt.decision, json.dumps(attempt.ranks))
        with self._transaction():
            query = "SELECT COALESCE(MAX(number), 0) + 1 FROM attempt WHERE sweep_id=?"
            number = self._db.execute(query, (sweep_id,)).fetchone()[0]
            self._db.execute(
                "INSERT INTO attempt VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?)",
                (sweep_id, number, time.time(), cell_id, cp_size, launch, task.action, task.block, *told),
            )

    def attempts(self, sweep_id: str) -> list[dict[str, Any]]:
        """Every attempt that failed, in order."""
        rows = self._db.execute("SELECT * FROM attempt WHERE sweep_id=? ORDER BY number", (sweep_id,))
        return [{**dict(row), "ranks": json.loads(row["ranks"])} for row in rows]

    def fail_cell(self, sweep_id: str, cell_id: str, failure: str) -> None:
        """The cell was given up."""
        with self._transaction():
            self._db.execute("UPDATE cell SET failure=? WHERE sweep_id=? AND cell_id=?", (failure, sweep_id, cell_id))

    def add_block(
        self,
        sweep_id: str,
        cell_id: str,
        launch: int,
        kind: str,
        block: int,
        reports: Sequence[BlockReport],
        wall_us: float,
        shares_clock: bool = True,
    ) -> None:
        """A measured block: all its trials of all ranks, in one transaction. Arrivals are dropped where ranks share no clock.

        Raises:
            sqlite3.Error: The disk is full or gone; nothing of the block is kept then.
        """
        key = (sweep_id, cell_id, launch, kind, block)
        started_s = time.time() - wall_us / 1e6
        with self._transaction():
            self._db.execute(
                "INSERT OR REPLACE INTO block VALUES (?,?,?,?,?,?,?,?)",
                (*key, started_s, wall_us, max(r.busy_us for r in reports)),
            )
            states = [asdict(report.device_state) for report in reports if report.device_state is not None]
            if states:
                self._db.execute("INSERT OR REPLACE INTO device_state VALUES (?,?,?,?,?,?)", (*key, json.dumps(states)))
            self._db.execute("DELETE FROM trial WHERE sweep_id=? AND cell_id=? AND launch=? AND kind=? AND block=?", key)
            for position, rows in enumerate(zip(*(report.rows for report in reports), strict=True)):
                # Nanoseconds are the clock's resolution; more digits are noise on disk.
                ranks = [[None if us is None else round(us, 3) for us in _RANK_VALUES(row)] for row in rows]
                if not shares_clock:
                    for values in ranks:
                        values[_ARRIVAL] = None
                first = rows[0]
                self._db.execute(
                    "INSERT INTO trial VALUES (?,?,?,?,?,?,?,?,?,?)",
                    (*key, position, first.variant, first.row, first.step, json.dumps(ranks)),
                )

    def end_sweep(self, sweep_id: str, status: SweepStatus, failure: str = "") -> None:
        with self._transaction():
            self._db.execute(
                "UPDATE sweep SET status=?, failure=?, ended_s=? WHERE sweep_id=?", (status, failure, time.time(), sweep_id)
            )

    def reopen(self, sweep_id: str, resumed: dict[str, Any]) -> None:
        """The sweep goes on: it runs, nothing of it is given up yet, and what is published of it is out of date."""
        with self._transaction():
            environment = json.loads(
                self._db.execute("SELECT environment FROM sweep WHERE sweep_id=?", (sweep_id,)).fetchone()[0]
            )
            environment["resumed"] = [*environment.get("resumed", []), resumed]
            self._db.execute(
                "UPDATE sweep SET status=?, failure='', ended_s=NULL, published_uri=NULL, published_s=NULL, environment=? WHERE sweep_id=?",
                (SweepStatus.RUNNING, json.dumps(environment), sweep_id),
            )
            self._db.execute("UPDATE cell SET failure='' WHERE sweep_id=?", (sweep_id,))

    def mark_published(self, sweep_id: str, uri: str) -> None:
        with self._transaction():
            self._db.execute("UPDATE sweep SET published_uri=?, published_s=? WHERE sweep_id=?", (uri, time.time(), sweep_id))

    # Reading.

    @property
    def connection(self) -> sqlite3.Connection:
        """For rooms that copy whole tables, or ask what is asked nowhere else."""
        return self._db

    def find(self, word: str) -> str:
        """The id of the sweep that `word` means: an id, a prefix that only one has, or `last`.

        Raises:
            UserError: None or several.
        """
        return choose_sweep(word, self._sweep_ids(), "the records under CPLAB_HOME")

    def _sweep_ids(self) -> list[str]:
        """Newest first."""
        return [r["sweep_id"] for r in self._db.execute("SELECT sweep_id FROM sweep ORDER BY started_s DESC, sweep_id DESC")]

    def sweep(self, sweep_id: str) -> dict[str, Any]:
        """The sweep's row, JSON columns decoded.

        Raises:
            UserError: There is no such sweep.
        """
        row = self._db.execute("SELECT * FROM sweep WHERE sweep_id=?", (sweep_id,)).fetchone()
        if row is None:
            known = ", ".join(self._sweep_ids()[:5]) or "none"
            raise UnknownSweepError(f"SWEEP: no sweep {sweep_id!r} in the records; the latest are: {known}")
        values = dict(row)
        for column in ("spec", "environment", "replay"):
            values[column] = json.loads(values[column]) if values[column] else None
        return values

    def unpublished(self, uri: str) -> list[str]:
        """Ended sweeps that this tracking store does not hold yet, oldest first."""
        rows = self._db.execute(
            "SELECT sweep_id FROM sweep WHERE status != ? AND (published_uri IS NULL OR published_uri != ?) "
            f"AND json_extract(environment, '$.{SAMPLES_REMOVED}') IS NULL ORDER BY started_s",
            (SweepStatus.RUNNING, uri),
        )
        return [row["sweep_id"] for row in rows]

    def launches(self, sweep_id: str) -> list[dict[str, Any]]:
        rows = self._db.execute("SELECT * FROM launch WHERE sweep_id=? ORDER BY cp_size, launch", (sweep_id,))
        return [{**dict(row), "ranks": json.loads(row["ranks"])} for row in rows]

    def settlings(self, sweep_id: str) -> list[dict[str, Any]]:
        """How every launch's warm-up of every cell ended."""
        return [
            dict(row) for row in self._db.execute("SELECT * FROM settling WHERE sweep_id=? ORDER BY cell_id, launch", (sweep_id,))
        ]

    def cell_spans(self, sweep_id: str) -> dict[str, tuple[float, float]]:
        """cell_id -> start of its first block and end of its last, seconds since the epoch; cells without a block are absent.

        A cell's blocks are spread over launches, so the spans of two cells overlap.
        """
        rows = self._db.execute(
            "SELECT cell_id, MIN(started_s), MAX(started_s + wall_us / 1e6) FROM block WHERE sweep_id=? GROUP BY cell_id",
            (sweep_id,),
        )
        return {cell_id: (start_s, end_s) for cell_id, start_s, end_s in rows}

    def traces(self, sweep_id: str) -> dict[str, list[TraceReport]]:
        """cell_id -> the reports of its traced trials, in rank order; cells without a trace are absent."""
        rows = self._db.execute("SELECT cell_id, reports FROM trace WHERE sweep_id=?", (sweep_id,))
        return {row["cell_id"]: _TRACE_REPORTS.validate_json(row["reports"]) for row in rows}

    def cell(self, sweep_id: str, cell_id: str) -> CellRecord:
        """One cell of a sweep with all that was measured of it so far."""
        row = self._db.execute("SELECT * FROM cell WHERE sweep_id=? AND cell_id=?", (sweep_id, cell_id)).fetchone()
        assert row is not None, f"no cell {cell_id} in sweep {sweep_id}"
        return self._cell(sweep_id, row)

    def cells(self, sweep_id: str) -> list[CellRecord]:
        """Every cell of a sweep with all that was measured of it."""
        rows = self._db.execute("SELECT * FROM cell WHERE sweep_id=? ORDER BY position", (sweep_id,)).fetchall()
        return [self._cell(sweep_id, row) for row in rows]

    def _cell(self, sweep_id: str, row: sqlite3.Row) -> CellRecord:
        key = (sweep_id, row["cell_id"])
        faults = self._db.execute('SELECT arm, "check", detail FROM fault WHERE sweep_id=? AND cell_id=?', key).fetchall()
        checks = self._db.execute(
            "SELECT launch, phase, reports FROM verification WHERE sweep_id=? AND cell_id=?", key
        ).fetchall()
        trials = self._db.execute(
            "SELECT * FROM trial WHERE sweep_id=? AND cell_id=? ORDER BY launch, kind, block, position", key
        ).fetchall()
        states = self._db.execute("SELECT states FROM device_state WHERE sweep_id=? AND cell_id=?", key)
        cell = json.loads(row["cell"])
        return CellRecord(
            cell=cell,
            trials=[_trial(trial) for trial in trials],
            faults=tuple(Fault(f["arm"], f["check"], f["detail"]) for f in faults),
            failure=row["failure"],
            checks={
                **_summarise_checks([report for check in checks for report in json.loads(check["reports"])]),
                "unsettled_launches": self._unsettled(sweep_id, row["cell_id"]),
            },
            path=row["path"],
            gather_floor_us=row["floor_us"],
            device_states=[tuple(_DEVICE_STATES.validate_json(state["states"])) for state in states],
            shares_gpus=any(
                shared_gpus(launch["ranks"]) for launch in self.launches(sweep_id) if launch["cp_size"] == cell["cp_size"]
            ),
        )


def choose_sweep(word: str, ids: Sequence[str], place: str) -> str:
    """Which of `ids`, newest first, `word` means.

    Raises:
        UserError: None or several; names the latest.
    """
    found = ids[:1] if word == LAST else [i for i in ids if i == word] or [i for i in ids if word and i.startswith(word)]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"SWEEP: {word!r} begins {len(found)} sweeps in {place}: {', '.join(found[:5])}: give more of the id")
    raise UnknownSweepError(f"SWEEP: no sweep {word!r} in {place}; the latest are: {', '.join(ids[:5]) or 'none'}")


def _trial(row: sqlite3.Row) -> Trial:
    ranks = json.loads(row["ranks"])
    kept = list(zip(*ranks, strict=True))
    column: dict[str, tuple[Any, ...]] = {
        name: kept[i] if i < len(kept) else (None,) * len(ranks) for i, name in enumerate(RANK_FIELDS)
    }
    arrivals = [us for us in column["arrival_us"] if us is not None]
    first_us = min(arrivals, default=0.0)
    return Trial(
        launch=row["launch"],
        block=row["block"],
        kind=row["kind"],
        row=row["row"],
        step=row["step"],
        variant=row["variant"],
        elapsed_us=column["elapsed_us"],
        window_us=column["window_us"],
        gather_us=column["gather_us"],
        wire_us=column["wire_us"],
        late_us=column["late_us"],
        filler_us=column["filler_us"],
        enqueue_us=column["enqueue_us"],
        skew_us=max(arrivals) - first_us if arrivals else None,
        lateness_us=tuple(None if us is None else us - first_us for us in column["arrival_us"]),
    )


def _summarise_checks(reports: list[dict[str, Any]]) -> dict[str, Any]:
    recalls = [r["recall"] for r in reports if r["recall"] is not None]
    unrounded = [r["recall_unrounded"] for r in reports if r["recall_unrounded"] is not None]
    return {
        "num_checks": sum(r["num_checks"] for r in reports),
        "recall_r2": min(recalls) if recalls else None,
        "recall_r1": min(unrounded) if unrounded else None,
        "gates": [gate for r in reports if r["gates"] for gate in r["gates"]][:32],
    }
