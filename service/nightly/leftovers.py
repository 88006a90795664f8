"""Leftovers: what a driver that died left as RUNNING, in the records and in MLflow, and what it truly came to."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from experiments.errors import UserError
from experiments.names import SweepStatus
from experiments.spec.experiment import ExperimentSpec
from service.store.claim import claimant
from service.store.judged import load_result
from service.store.planned_run import KEY_TAG, plan_runs
from service.store.records import Records, UnknownSweepError
from service.store.schema import Transaction

ABANDONED_S = 86_400.0
"""Without a driver for so long, a sweep is taken to have been given up; `cplab run --resume` still goes on with it."""

DRIVER_GONE = "its driver died without a word"


@dataclass(frozen=True)
class LeftRun:
    """A run that MLflow shows as RUNNING and nobody writes.

    Attributes:
        status, end_ms: What its sweep's records say of it.
    """

    run_id: str
    name: str
    sweep_id: str
    status: str
    end_ms: int


def measured_now(records: Records) -> list[str]:
    """Sweeps that a living driver writes."""
    return [sweep_id for sweep_id, _ in _running(records) if claimant(records.path, sweep_id)]


def abandoned(records: Records) -> list[tuple[str, float]]:
    """(sweep_id, its last sign of life, seconds since the epoch) of sweeps that have been without a driver for a day."""
    limit_s = time.time() - ABANDONED_S
    return [
        (sweep_id, last_s) for sweep_id, last_s in _running(records) if last_s < limit_s and not claimant(records.path, sweep_id)
    ]


def _running(records: Records) -> list[tuple[str, float]]:
    rows = records.connection.execute(
        "SELECT sweep_id, MAX(started_s, COALESCE((SELECT MAX(b.started_s + b.wall_us / 1e6) FROM block b "
        "WHERE b.sweep_id = sweep.sweep_id), 0)) FROM sweep WHERE status=?",
        (SweepStatus.RUNNING,),
    )
    return [(str(sweep_id), float(last_s)) for sweep_id, last_s in rows.fetchall()]


def end_abandoned(records: Records, sweep_id: str, last_s: float) -> None:
    """The sweep is KILLED, and ended when it was last heard of."""
    with Transaction(records.connection):
        records.connection.execute(
            "UPDATE sweep SET status=?, failure=?, ended_s=? WHERE sweep_id=? AND status=?",
            (SweepStatus.KILLED, DRIVER_GONE, last_s, sweep_id, SweepStatus.RUNNING),
        )


def left_runs(records: Records, client: Any) -> list[LeftRun]:
    """Ours that are RUNNING though their sweep has ended. Runs of sweeps that these records do not know are another home's."""
    found: list[LeftRun] = []
    truths: dict[str, tuple[Mapping[str, str], dict[str, Any]]] = {}
    for run in _running_runs(client):
        key, sweep_id = run.data.tags.get(KEY_TAG), run.data.tags.get("sweep_id", "")
        if key is None:
            continue
        try:
            if sweep_id not in truths:
                row = records.sweep(sweep_id)
                truths[sweep_id] = _statuses(records, row), row
        except UnknownSweepError:
            continue
        statuses, row = truths[sweep_id]
        if row["ended_s"] is not None:
            end_ms = max(round(row["ended_s"] * 1000), run.info.start_time)
            found.append(LeftRun(run.info.run_id, run.info.run_name, sweep_id, statuses.get(key, row["status"]), end_ms))
    return found


def _running_runs(client: Any) -> list[Any]:
    runs: list[Any] = []
    token: str | None = None
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    while True:
        page = client.search_runs(experiments, "attributes.status = 'RUNNING'", max_results=1000, page_token=token)
        runs += page
        token = page.token
        if not token:
            return runs


def _statuses(records: Records, row: dict[str, Any]) -> Mapping[str, str]:
    """Key of a run -> the status with which it would be published; empty where the sweep can not be judged any more."""
    if row["ended_s"] is None:
        return {}
    try:
        result = load_result(records, row["sweep_id"])
    except UserError:
        return {}
    runs = plan_runs(row, ExperimentSpec.model_validate(row["spec"]), result, {})
    return {run.key: run.status for run in runs}


def close_run(client: Any, run: LeftRun) -> None:
    """A later `cplab sync` still makes it anew where it is not complete: it goes by the mark of completeness."""
    client.set_terminated(run.run_id, run.status, run.end_ms)
