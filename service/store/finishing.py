"""What is written once all runs of a sweep have their ids: histories, how nights ended, notes with links, and the prepared views.

Everything here is compared with what stands there first: a repeat writes nothing, and one after a crash writes what is missing.
"""

from __future__ import annotations

from collections.abc import Mapping

from service.judge.results import SweepResult
from service.store.arm_note import arm_note, curve_note, history_note
from service.store.curves import curves_of
from service.store.history_runs import plan_histories, publish_histories
from service.store.home import Home
from service.store.mlflow_store import TrackingStore
from service.store.night_status import publish_statuses
from service.store.note import note
from service.store.records import Records
from service.store.run_links import RunLinks
from service.store.view import View, write_views

NOTE_TAG = "mlflow.note.content"


def finish(
    store: TrackingStore, records: Records, result: SweepResult, home: Home, runs: Mapping[str, str], traced: frozenset[str]
) -> list[View]:
    """Hold the lock.

    Args:
        runs: `PlannedRun.key` -> run id.
        traced: Ids of cells whose runs have a trace.
    """
    client, experiment_id = store.client, store.experiment_id
    planned = plan_histories(records, home, result.sweep_id)
    histories = publish_histories(client, experiment_id, planned)
    statuses = publish_statuses(client, experiment_id, home)
    is_last = bool(planned) and planned[0].sweep_id == result.sweep_id
    of_cells = {(run.cell_id, run.arm): histories[run.key] for run in planned}
    links = RunLinks(experiment_id, result.sweep_id, runs, of_cells, traced)
    notes = _notes(result, links, statuses.get(result.sweep_id, ""))
    if is_last:
        notes |= {histories[run.key]: history_note(run, links.of_history(run.cell_id, run.arm)) for run in planned}
    for run_id, text in notes.items():
        if client.get_run(run_id).data.tags.get(NOTE_TAG) != text:
            client.set_tag(run_id, NOTE_TAG, text)
    return write_views(client, experiment_id)


def _notes(result: SweepResult, links: RunLinks, title: str) -> dict[str, str]:
    """Run id -> note."""
    sweep_id = result.sweep_id
    notes = {links.runs[f"{sweep_id}/summary"]: note(result, links.of_summary(result), title)}
    for cell in result.cells:
        for arm in cell.arms:
            run_id = links.runs[f"{sweep_id}/{cell.cell['cell_id']}/{arm.arm}"]
            notes[run_id] = arm_note(result, cell, arm, links.of_arm(cell, arm.arm))
    for curve in curves_of(result):
        notes[links.runs[f"{sweep_id}/curve/{curve.arm}/{curve.label}"]] = curve_note(curve, links.of_sweep())
    return notes
