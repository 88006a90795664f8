"""A sweep as judged from its records, whenever that is asked."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

from experiments.errors import UserError
from experiments.names import METHODOLOGY_VERSION, SweepStatus
from experiments.spec.experiment import ExperimentSpec
from service.judge.change import JudgedSweep
from service.judge.judging import judge_sweep
from service.judge.results import SweepResult
from service.judge.suspects import suspects
from service.store.records import SAMPLES_REMOVED, Records


def load_result(records: Records, sweep_id: str) -> SweepResult:
    """A sweep as judged from its records, whenever that is asked."""
    row = records.sweep(sweep_id)
    if row["methodology_version"] != METHODOLOGY_VERSION:
        raise UserError(
            f"SWEEP: {sweep_id} was measured under methodology {row['methodology_version']}, this version judges {METHODOLOGY_VERSION}: "
            "use the version of cplab that measured it"
        )
    if removed := row["environment"].get(SAMPLES_REMOVED):
        raise UserError(
            f"SWEEP: the samples of {sweep_id} were removed on {removed} (`cplab gc`): its report.html and result.json are artifacts of its "
            "summary run in MLflow"
        )
    spec = ExperimentSpec.model_validate(row["spec"])
    cells = records.cells(sweep_id)
    status = SweepStatus(row["status"])
    judged = judge_sweep(cells, spec, at_planned_looks=status in (SweepStatus.RUNNING, SweepStatus.KILLED))
    aa, is_flagged = judged.aa, set(judged.aa.flagged)
    if is_flagged:
        preflight = row["environment"].get("preflight", [])
        aa = replace(aa, suspects=suspects(preflight, [c for c in cells if c.cell["label"] in is_flagged]))
    return SweepResult(
        sweep_id=sweep_id,
        experiment=row["experiment"],
        status=status,
        spec_hash=row["spec_hash"],
        environment={**row["environment"], "launches": records.launches(sweep_id)},
        cells=judged.cells,
        replay=row["replay"],
        started_at=utc(row["started_s"]),
        ended_at=utc(row["ended_s"]) if row["ended_s"] else None,
        failure=row["failure"],
        aa=aa,
        confidence=judged.confidence,
        methodology_version=row["methodology_version"],
    )


def load_judged(records: Records, sweep_id: str) -> JudgedSweep:
    """A sweep with its evidence, for a comparison with another.

    Raises:
        UserError: It still runs, or was measured under another methodology.
    """
    row = records.sweep(sweep_id)
    if row["status"] == SweepStatus.RUNNING:
        raise UserError(f"SWEEP: {sweep_id} is still running: compare it when it has ended")
    return JudgedSweep(load_result(records, sweep_id), ExperimentSpec.model_validate(row["spec"]), records.cells(sweep_id))


def utc(seconds: float) -> str:
    """Seconds since the epoch as people read them, to the second."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
