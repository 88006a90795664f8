"""An extract: one sweep's rows of every table of the records, as compressed JSON. The summary run carries it, so that whoever has MLflow
alone judges the same samples with the same code. JSON, and not the database itself: a file from elsewhere is data and nothing more.
"""

from __future__ import annotations

import gzip
import io
import json
import math
import sqlite3
from pathlib import Path
from typing import Any

from experiments.errors import UserError
from service.store.records import Records
from service.store.schema import SCHEMA_VERSION

FILE_NAME = "records.json.gz"
_KIND = "cplab-sweep-records"
_MAX_BYTES = 1 << 31
"""Of the text: a bound against a file that unpacks without end."""


def _tables(db: sqlite3.Connection) -> dict[str, dict[str, str]]:
    """Tables with rows of sweeps: name -> column -> declared type."""
    names = [row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    columns = {name: {row[1]: row[2] for row in db.execute(f'PRAGMA table_info("{name}")')} for name in names}
    return {name: kinds for name, kinds in columns.items() if "sweep_id" in kinds}


def extract_sweep(records: Records, sweep_id: str) -> bytes:
    """The whole of a sweep; equal bytes for equal rows."""
    db = records.connection
    tables: dict[str, Any] = {}
    for name, kinds in _tables(db).items():
        rows = db.execute(f'SELECT * FROM "{name}" WHERE sweep_id = ? ORDER BY rowid', (sweep_id,)).fetchall()
        tables[name] = {"columns": list(kinds), "rows": [[_strict(value) for value in row] for row in rows]}
    text = json.dumps({"kind": _KIND, "schema": SCHEMA_VERSION, "sweep_id": sweep_id, "tables": tables}, allow_nan=False)
    return gzip.compress(text.encode(), compresslevel=6, mtime=0)


def records_of(extract: bytes) -> tuple[Records, str]:
    """Records in memory that hold the extracted sweep, and its id.

    Raises:
        UserError: These bytes are no extract, or of another schema.
    """
    content = _decode(extract)
    if content["schema"] != SCHEMA_VERSION:
        raise UserError(f"SWEEP: {FILE_NAME} holds records of schema {content['schema']}, this version reads {SCHEMA_VERSION}")
    records = Records(Path(":memory:"))
    db = records.connection
    try:
        for name, kinds in _tables(db).items():
            table = content["tables"].get(name, {"columns": [], "rows": []})
            # Names come from our own schema, never from the file.
            shared = [column for column in kinds if column in table["columns"]]
            places = [table["columns"].index(column) for column in shared]
            if shared:
                marks, named = ",".join("?" * len(shared)), ",".join(f'"{column}"' for column in shared)
                rows = [[_loose(row[i], kinds[c]) for i, c in zip(places, shared, strict=True)] for row in table["rows"]]
                db.executemany(f'INSERT INTO "{name}" ({named}) VALUES ({marks})', rows)
    except (sqlite3.Error, LookupError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"SWEEP: {FILE_NAME} is damaged: {error}") from None
    return records, str(content["sweep_id"])


def _decode(extract: bytes) -> dict[str, Any]:
    try:
        with gzip.open(io.BytesIO(extract)) as stream:
            text = stream.read(_MAX_BYTES)
        content = json.loads(text)
    except (OSError, EOFError, ValueError, RecursionError) as error:
        raise UserError(f"SWEEP: {FILE_NAME} cannot be read: {error}") from None
    if not isinstance(content, dict) or content.get("kind") != _KIND:
        raise UserError(f"SWEEP: {FILE_NAME} is no extract of records")
    return content


def _strict(value: Any) -> Any:
    """JSON knows no infinity (the trend of a single block is one)."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _loose(value: Any, kind: str) -> Any:
    return float(value) if kind.startswith("REAL") and isinstance(value, str) else value
