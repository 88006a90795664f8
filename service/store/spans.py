"""When each cell was measured, read from the records: MLflow's start and end times are those, not the time of publishing."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path


def cell_spans(path: Path, sweep_id: str) -> dict[str, tuple[float, float]]:
    """cell_id -> start of the first block and end of the last one, seconds since the epoch; cells without a block are absent.

    A cell's blocks are spread over launches, so the spans of two cells overlap.

    Raises:
        sqlite3.Error: There are no records at `path`.
    """
    with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=30)) as db:
        rows = db.execute(
            "SELECT cell_id, MIN(started_s), MAX(started_s + wall_us / 1e6) FROM block WHERE sweep_id=? GROUP BY cell_id",
            (sweep_id,),
        )
        return {cell_id: (start_s, end_s) for cell_id, start_s, end_s in rows}
