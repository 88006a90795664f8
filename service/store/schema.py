"""The tables of the records, and how a file of them is opened: created, migrated, or refused by name."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

from experiments.errors import UserError
from service.store.space import RecordsError, records_error

SCHEMA_VERSION = 2
"""2: a trial's ranks hold what the filler and the enqueuing took. Records of schema 1 are taken as they are: they had neither."""

_SCHEMA = """
CREATE TABLE sweep (
    sweep_id TEXT PRIMARY KEY, experiment TEXT NOT NULL, suite TEXT NOT NULL, spec TEXT NOT NULL, spec_hash TEXT NOT NULL,
    status TEXT NOT NULL, failure TEXT NOT NULL DEFAULT '', started_s REAL NOT NULL, ended_s REAL, environment TEXT NOT NULL,
    replay TEXT, methodology_version INTEGER NOT NULL, published_uri TEXT, published_s REAL);
CREATE TABLE cell (
    sweep_id TEXT NOT NULL, cell_id TEXT NOT NULL, position INTEGER NOT NULL, cell TEXT NOT NULL, steps TEXT NOT NULL,
    floor_us REAL, path TEXT NOT NULL DEFAULT '', failure TEXT NOT NULL DEFAULT '', PRIMARY KEY (sweep_id, cell_id));
CREATE TABLE launch (
    sweep_id TEXT NOT NULL, cp_size INTEGER NOT NULL, launch INTEGER NOT NULL, ranks TEXT NOT NULL, launch_s REAL NOT NULL,
    started_s REAL NOT NULL, PRIMARY KEY (sweep_id, cp_size, launch));
CREATE TABLE verification (
    sweep_id TEXT NOT NULL, cell_id TEXT NOT NULL, launch INTEGER NOT NULL, phase TEXT NOT NULL, reports TEXT NOT NULL,
    PRIMARY KEY (sweep_id, cell_id, launch, phase));
CREATE TABLE fault (
    sweep_id TEXT NOT NULL, cell_id TEXT NOT NULL, arm TEXT NOT NULL, "check" TEXT NOT NULL, detail TEXT NOT NULL,
    UNIQUE (sweep_id, cell_id, arm, "check", detail));
CREATE TABLE block (
    sweep_id TEXT NOT NULL, cell_id TEXT NOT NULL, launch INTEGER NOT NULL, kind TEXT NOT NULL, block INTEGER NOT NULL,
    started_s REAL NOT NULL, wall_us REAL NOT NULL, busy_us REAL NOT NULL, PRIMARY KEY (sweep_id, cell_id, launch, kind, block));
CREATE TABLE trial (
    sweep_id TEXT NOT NULL, cell_id TEXT NOT NULL, launch INTEGER NOT NULL, kind TEXT NOT NULL, block INTEGER NOT NULL,
    position INTEGER NOT NULL, variant TEXT NOT NULL, "row" INTEGER NOT NULL, step INTEGER NOT NULL, ranks TEXT NOT NULL,
    PRIMARY KEY (sweep_id, cell_id, launch, kind, block, position));
"""

_LATER_TABLES = """
CREATE TABLE IF NOT EXISTS settling (
    sweep_id TEXT NOT NULL, cell_id TEXT NOT NULL, launch INTEGER NOT NULL, blocks INTEGER NOT NULL, trend REAL NOT NULL,
    is_settled INTEGER NOT NULL, PRIMARY KEY (sweep_id, cell_id, launch));
CREATE TABLE IF NOT EXISTS spent (
    sweep_id TEXT NOT NULL, cell_id TEXT NOT NULL, cp_size INTEGER NOT NULL, launch INTEGER NOT NULL, action TEXT NOT NULL,
    block INTEGER NOT NULL, took_s REAL NOT NULL, PRIMARY KEY (sweep_id, cell_id, cp_size, launch, action, block));
CREATE TABLE IF NOT EXISTS device_state (
    sweep_id TEXT NOT NULL, cell_id TEXT NOT NULL, launch INTEGER NOT NULL, kind TEXT NOT NULL, block INTEGER NOT NULL,
    states TEXT NOT NULL, PRIMARY KEY (sweep_id, cell_id, launch, kind, block));
CREATE TABLE IF NOT EXISTS attempt (
    sweep_id TEXT NOT NULL, number INTEGER NOT NULL, failed_s REAL NOT NULL, cell_id TEXT NOT NULL, cp_size INTEGER NOT NULL,
    launch INTEGER NOT NULL, action TEXT NOT NULL, block INTEGER NOT NULL, attempt INTEGER NOT NULL, cause TEXT NOT NULL,
    evidence TEXT NOT NULL, decision TEXT NOT NULL, ranks TEXT NOT NULL, PRIMARY KEY (sweep_id, number));
CREATE TABLE IF NOT EXISTS trace (
    sweep_id TEXT NOT NULL, cell_id TEXT NOT NULL, launch INTEGER NOT NULL, reports TEXT NOT NULL, PRIMARY KEY (sweep_id, cell_id));
"""
"""Made on opening where they are missing: a file that lacks them is whole otherwise."""


def open_records(path: Path) -> sqlite3.Connection:
    """A connection to a file with all tables; rows come by column name.

    Raises:
        UserError: The file cannot be opened, is no record file, or is of another schema.
    """
    try:
        db = sqlite3.connect(path, timeout=30, isolation_level=None)
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=NORMAL")
        with Transaction(db):
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version == 0:
                if other := db.execute("SELECT name FROM sqlite_master WHERE type='table' LIMIT 1").fetchone():
                    raise UserError(
                        f"CPLAB_HOME: {str(path)!r} is no record file: it is a database with a table {other[0]!r}: set another CPLAB_HOME"
                    )
                for statement in _SCHEMA.split(";"):
                    db.execute(statement)
            elif version not in (1, SCHEMA_VERSION):
                raise UserError(
                    f"CPLAB_HOME: {str(path)!r} holds records of schema {version}, this version reads {SCHEMA_VERSION}: set another CPLAB_HOME"
                )
            db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
            for statement in _LATER_TABLES.split(";"):
                db.execute(statement)
    except (sqlite3.Error, RecordsError) as error:
        cause = error.__cause__ or error
        raise UserError(f"CPLAB_HOME: records at {str(path)!r} cannot be opened: {cause}") from None
    db.row_factory = sqlite3.Row
    return db


class Transaction:
    """All or nothing; takes the write lock at once, so that two writers queue instead of failing.

    Raises:
        RecordsError: The disk is full, gone or read-only; nothing of it is kept then.
    """

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def __enter__(self) -> None:
        try:
            self._db.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError as error:
            raise self._words(error) from error

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        failed = error if isinstance(error, sqlite3.OperationalError) else None
        try:
            if self._db.in_transaction:  # SQLite has rolled back by itself after some errors
                self._db.execute("ROLLBACK" if kind else "COMMIT")
        except sqlite3.OperationalError as end:
            failed = failed or end
            with contextlib.suppress(sqlite3.Error):
                self._db.execute("ROLLBACK")
        if failed is not None:
            raise self._words(failed) from failed

    def _words(self, error: sqlite3.OperationalError) -> RecordsError:
        return records_error(error, str(self._db.execute("PRAGMA database_list").fetchone()[2]))
