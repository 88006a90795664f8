"""A suite night after night in a home with an MLflow: planted sweeps, read and published as `cplab nightly` does it."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date, datetime, timedelta
from typing import Any
from unittest import mock

from experiments.names import Lane
from experiments.spec.experiment import ExperimentSpec
from service.judge.results import SweepResult
from service.nightly.night import hold_night
from service.store.home import Home
from service.store.judged import load_result
from service.store.records import Records
from service.store.tracking import publish
from tests.service import synthetic
from tests.service.synthetic import make_spec, make_sweep
from workers.messages import ArmTrace, TraceReport
from workers.timeline import Span

FIRST = date(2026, 3, 1)


def nightly_spec(num_cells: int = 2, **changes: Any) -> ExperimentSpec:
    """Two fabrics, and as many lengths as the number of cells needs."""
    return make_spec(num_cells, **{"name": "nightly"} | changes)


def sweep_of(night: str) -> str:
    return f"{night.replace('-', '')}-033000-abcd"


def plant_nights(
    home: Home, spec: ExperimentSpec, hidden: list[float], is_published: bool = True, is_traced: bool = False
) -> list[str]:
    """As many nights as `hidden` has shares of the gather that the arm hides; their names.

    Args:
        is_traced: Each night traces its first cell.
    """
    nights = []
    for position, share in enumerate(hidden):
        night = (FIRST + timedelta(days=position)).isoformat()
        with mock.patch.dict(synthetic.HIDDEN, {"overlapped": share}), mock.patch.dict(synthetic.ENVIRONMENT):
            hold_night(spec, home, night, lambda s, extra, night=night: _measure(home, s, extra, night, is_published, is_traced))
        nights.append(night)
    return nights


def _measure(
    home: Home, spec: ExperimentSpec, extra: Mapping[str, Any], night: str, is_published: bool, is_traced: bool
) -> SweepResult:
    synthetic.ENVIRONMENT.update(extra)
    records, result = make_sweep(home, spec, sweep_of(night), scale=lambda cell: cell.new_tokens / 64)
    if is_traced:
        _trace(records, result)
    _move_to(records, result.sweep_id, datetime.fromisoformat(f"{night}T03:30:00+00:00").timestamp())
    result = load_result(records, result.sweep_id)
    if is_published:
        publish(records, result.sweep_id, result, home)
    records.close()
    return result


def _trace(records: Records, result: SweepResult) -> None:
    """One traced trial of every arm of the first cell, on two ranks."""
    for_rank = [(Span("rotate_q", Lane.MAIN, rank, 5, 9), Span("gather", Lane.MAIN, rank, 10, 20)) for rank in (0, 1)]
    arms = [arm.arm for arm in result.cells[0].arms]
    reports = [
        TraceReport(rank, tuple(ArmTrace(arm, 0, 21, spans) for arm in arms), (), 0, 0) for rank, spans in enumerate(for_rank)
    ]
    records.add_trace(result.sweep_id, result.cells[0].cell["cell_id"], 4, reports)


def _move_to(records: Records, sweep_id: str, start_s: float) -> None:
    """As if the sweep had run then."""
    db = records.connection
    shift = start_s - db.execute("SELECT started_s FROM sweep WHERE sweep_id=?", (sweep_id,)).fetchone()[0]
    for table in ("sweep", "launch", "block"):
        db.execute(f"UPDATE {table} SET started_s = started_s + ? WHERE sweep_id=?", (shift, sweep_id))
    db.execute("UPDATE sweep SET ended_s = ended_s + ? WHERE sweep_id=?", (shift, sweep_id))
