"""What runs, how far it is, and what failed last: from the records of this home."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from typing import Any

from experiments.names import SweepStatus
from service.run.resume import ended_visits
from service.store.claim import claimant
from service.store.judged import utc
from service.store.records import Records

LAST_FAILURES = 5


@dataclass(frozen=True)
class Running:
    """A sweep that the records call RUNNING.

    Attributes:
        driver: `pid` and `host`; None when it is gone: only `--resume` goes on with it.
        visits_done: Cells in a launch that are complete, of `visits_planned` (at the most: decided cells stop sooner).
        idle_s: Since its last block; None before the first.
        cluster: The address of the shared cluster whose lease it holds; empty on one of its own.
        at: The last task that ended: `launch` (from 1), `action`, `cell`; None before the first.
        ranks: Of the last launch: `rank, hostname, address, gpu, rank_pid`.
        spent: Of every cell that was begun: `cell_id, label, seconds`, and `gpu_seconds`: seconds times the GPUs that its ranks hold (0 on a CPU).
    """

    sweep_id: str
    experiment: str
    started_at: str
    driver: dict[str, Any] | None
    visits_done: int
    visits_planned: int
    cells: int
    invalid: int
    given_up: int
    failed_attempts: int
    idle_s: float | None
    cluster: str
    at: dict[str, Any] | None
    ranks: list[dict[str, Any]]
    spent: list[dict[str, Any]]


def running(records: Records) -> list[Running]:
    """Newest first."""
    query = "SELECT sweep_id FROM sweep WHERE status=? ORDER BY started_s DESC"
    return [_running(records, row["sweep_id"]) for row in records.connection.execute(query, (SweepStatus.RUNNING,)).fetchall()]


def _running(records: Records, sweep_id: str) -> Running:
    row, db = records.sweep(sweep_id), records.connection
    cells = db.execute("SELECT COUNT(*), SUM(failure != '') FROM cell WHERE sweep_id=?", (sweep_id,)).fetchone()
    invalid = db.execute("SELECT COUNT(DISTINCT cell_id) FROM fault WHERE sweep_id=?", (sweep_id,)).fetchone()[0]
    last_s = db.execute("SELECT MAX(started_s + wall_us / 1e6) FROM block WHERE sweep_id=?", (sweep_id,)).fetchone()[0]
    plan = row["spec"]["measurement"]
    cluster = row["environment"].get("cluster", {})
    return Running(
        sweep_id=sweep_id,
        experiment=row["experiment"],
        started_at=utc(row["started_s"]),
        driver=claimant(records.path, sweep_id),
        visits_done=len(ended_visits(records, sweep_id)),
        visits_planned=cells[0] * (plan["max_launches"] or plan["launches"]),
        cells=cells[0],
        invalid=invalid,
        given_up=cells[1] or 0,
        failed_attempts=len(records.attempts(sweep_id)),
        idle_s=round(time.time() - last_s, 1) if last_s else None,
        cluster="" if cluster.get("is_own", True) else str(cluster["address"]),
        at=_at(records, sweep_id),
        ranks=_ranks(records, sweep_id),
        spent=_spent(records, sweep_id),
    )


def _at(records: Records, sweep_id: str) -> dict[str, Any] | None:
    query = "SELECT cell_id, launch, action FROM spent WHERE sweep_id=? ORDER BY rowid DESC LIMIT 1"
    row = records.connection.execute(query, (sweep_id,)).fetchone()
    return {"launch": row["launch"] + 1, "action": row["action"], "cell": row["cell_id"]} if row else None


def _ranks(records: Records, sweep_id: str) -> list[dict[str, Any]]:
    launches = records.launches(sweep_id)
    last = max(launches, key=lambda launch: launch["started_s"], default=None)
    names = ("rank", "hostname", "address", "gpu", "rank_pid")
    return [{name: rank.get(name, "") for name in names} for rank in last["ranks"]] if last else []


def _spent(records: Records, sweep_id: str) -> list[dict[str, Any]]:
    query = (
        "SELECT cell.cell_id, cell.cell, spent.cp_size, SUM(took_s) AS took_s FROM spent JOIN cell ON cell.sweep_id = spent.sweep_id "
        "AND cell.cell_id = spent.cell_id WHERE spent.sweep_id=? GROUP BY cell.cell_id ORDER BY cell.position"
    )
    gpus = {
        launch["cp_size"]: len({rank.get("gpu_uuid") for rank in launch["ranks"]} - {None, ""})
        for launch in records.launches(sweep_id)
    }
    return [
        {
            "cell_id": row["cell_id"],
            "label": json.loads(row["cell"]).get("label", ""),
            "seconds": round(row["took_s"], 3),
            "gpu_seconds": round(row["took_s"] * gpus.get(row["cp_size"], 0), 3),
        }
        for row in records.connection.execute(query, (sweep_id,))
    ]


def last_failures(records: Records) -> list[dict[str, Any]]:
    """The latest attempts that failed, of any sweep, newest first."""
    query = (
        "SELECT sweep_id, failed_s, cell_id, launch, action, attempt, cause, decision FROM attempt ORDER BY failed_s DESC LIMIT ?"
    )
    rows = [dict(row) for row in records.connection.execute(query, (LAST_FAILURES,))]
    return [{"at": utc(row["failed_s"]), **row} for row in rows]


def status_values(records: Records) -> dict[str, Any]:
    """As JSON values. `lease`: the sweep of this home that holds a shared cluster."""
    sweeps = running(records)
    holder = next((sweep for sweep in sweeps if sweep.cluster and sweep.driver), None)
    lease = {"cluster": holder.cluster, "sweep_id": holder.sweep_id, **(holder.driver or {})} if holder else None
    counts = records.connection.execute("SELECT status, COUNT(*) FROM sweep GROUP BY status").fetchall()
    return {
        "schema": 1,
        "running": [asdict(s) for s in sweeps],
        "lease": lease,
        "last_failures": last_failures(records),
        "sweeps": {row["status"]: row["COUNT(*)"] for row in counts},
    }


def status_lines(records: Records) -> list[str]:
    """For a terminal."""
    values = status_values(records)
    lines = [line for sweep in values["running"] for line in _sweep_lines(sweep)] or ["nothing is running"]
    if lease := values["lease"]:
        lines.append(f"lease of {lease['cluster']}: sweep {lease['sweep_id']} (pid {lease.get('pid')} on {lease.get('host')})")
    for failure in values["last_failures"]:
        where = f"{failure['sweep_id']} launch {failure['launch'] + 1} {failure['action']} {failure['cell_id']}".rstrip()
        lines.append(f"failed {failure['at']} {where}, attempt {failure['attempt']}: {failure['cause']}: {failure['decision']}")
    return lines


def _sweep_lines(sweep: dict[str, Any]) -> list[str]:
    lines = [_sweep_words(sweep)]
    if at := sweep["at"]:
        lines.append(f"  last done: launch {at['launch']}: {at['action']} {at['cell']}".rstrip())
    if sweep["ranks"]:
        lines.append(
            "  ranks: "
            + ", ".join(f"{r['rank']} on {r['hostname']} ({r['address']}) {r['gpu']}".rstrip() for r in sweep["ranks"])
        )
    if any(cell["gpu_seconds"] for cell in sweep["spent"]):
        lines.append("  GPU-seconds: " + ", ".join(f"{cell['label']} {cell['gpu_seconds']:.0f}" for cell in sweep["spent"]))
    return lines


def _sweep_words(sweep: dict[str, Any]) -> str:
    driver = sweep["driver"]
    who = (
        f"pid {driver.get('pid')} on {driver.get('host')}"
        if driver
        else f"its driver is gone: cplab run --resume {sweep['sweep_id']}"
    )
    last = f", last block {sweep['idle_s']:.0f} s ago" if sweep["idle_s"] is not None else ""
    return (
        f"{sweep['sweep_id']} {sweep['experiment']}: {sweep['visits_done']} of at most {sweep['visits_planned']} launches of "
        f"{sweep['cells']} cells done, {sweep['invalid']} INVALID, {sweep['given_up']} given up, "
        f"{sweep['failed_attempts']} failed attempts{last} ({who})"
    )
