"""Traces as files under CPLAB_HOME: for each traced cell the events for Perfetto and the picture of its lanes.

They are made from the records, so they can be made again, and the tracking store gets copies.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from service.judge.results import CellResult, SweepResult
from service.report.lanes_picture import draw_lanes
from service.report.table import hardware
from service.report.timeline import chrome_trace
from service.store.home import Home
from service.store.records import Records

EVENTS_FILE = "trace.json"
PICTURE_FILE = "lanes.png"
"""Of the two lanes: a file of every traced cell under `Home.traces`, and an artifact of the summary run."""


def write_trace_files(home: Home, records: Records, result: SweepResult) -> dict[str, tuple[Path, ...]]:
    """cell_id -> the files of its trace. Cells without a trace are absent, and INVALID ones, which show no speed in any form.

    Raises:
        OSError: A file cannot be written.
    """
    traces = records.traces(result.sweep_id)
    files: dict[str, tuple[Path, ...]] = {}
    for cell in result.cells:
        reports = traces.get(cell.cell["cell_id"])
        if not reports or cell.is_invalid:
            continue
        folder = home.traces / result.sweep_id / cell.label
        folder.mkdir(parents=True, exist_ok=True)
        events, picture = folder / EVENTS_FILE, folder / PICTURE_FILE
        if not _is_made(events, result):
            events.write_text(chrome_trace(reports, _hosts(result, len(reports)), _about(result, cell)))
        if not _is_made(picture, result):
            draw_lanes(cell, reports, _title(result, cell), picture)
        files[cell.cell["cell_id"]] = events, picture
    return files


def _is_made(path: Path, result: SweepResult) -> bool:
    """Whether the file is there as it will stay: it quotes the timed trials, so one made while the sweep ran is out of date."""
    if result.ended_at is None or not path.exists():
        return False
    return path.stat().st_mtime >= datetime.fromisoformat(result.ended_at).timestamp() and path.stat().st_size > 0


def draw_first(records: Records, result: SweepResult, path: Path) -> None:
    """The picture of the first traced cell at a path of the user's; none where no cell is traced and valid.

    Raises:
        OSError: `path` cannot be written.
    """
    traces = records.traces(result.sweep_id)
    for cell in result.cells:
        if cell.cell["cell_id"] in traces and not cell.is_invalid:
            draw_lanes(cell, traces[cell.cell["cell_id"]], _title(result, cell), path)
            return


def _title(result: SweepResult, cell: CellResult) -> str:
    return f"{cell.label}, one traced, untimed trial of each arm; sweep {result.sweep_id}\n{hardware(result)}"


def _hosts(result: SweepResult, num_ranks: int) -> list[str]:
    launch: Mapping[str, Any] = next(launch for launch in result.environment["launches"] if len(launch["ranks"]) == num_ranks)
    return [str(rank["hostname"]) for rank in launch["ranks"]]


def _about(result: SweepResult, cell: CellResult) -> dict[str, Any]:
    return {
        "sweep_id": result.sweep_id,
        "cell_id": cell.cell["cell_id"],
        "cell": cell.label,
        "path": cell.path,
        "arms": {arm.arm: arm.factors for arm in cell.arms},
        "device": cell.cell["device"],
        "note": "untimed: one trial of each arm, for the reason of a result and not for its size",
    }
