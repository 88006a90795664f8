"""Resuming: what a sweep has on disk, and whether another run may add to it."""

from __future__ import annotations

from dataclasses import dataclass

from experiments.errors import UserError
from experiments.names import SweepStatus
from experiments.spec.experiment import ExperimentSpec
from service.environment import environment
from service.machine import code_of, differences, machine_of
from service.run.reproduction import stored_spec
from service.run.tasks import Action, Visit
from service.store.claim import claimant
from service.store.records import SAMPLES_REMOVED, Records


@dataclass(frozen=True)
class Resumption:
    """A sweep that goes on.

    Attributes:
        spec: The one that it began with.
        done: Visits that ended; all else is measured from scratch.
        invalid: Ids of the cells that are INVALID, and stay so.
        spent_s: What all its tasks took so far.
    """

    sweep_id: str
    spec: ExperimentSpec
    done: frozenset[Visit]
    invalid: frozenset[str]
    spent_s: float


def resumption(records: Records, word: str, given: ExperimentSpec | None = None) -> Resumption:
    """The sweep that `word` means (an id, a prefix of one, `last`), as it can go on; `given`: the spec that the user named.

    Raises:
        UserError: It runs, has nothing left to do, or would go on under another spec, methodology, code or machine: its launches would then be
            no launches of one thing.
    """
    sweep_id = records.find(word)
    row = records.sweep(sweep_id)
    if holder := claimant(records.path, sweep_id):
        raise UserError(
            f"SWEEP: {sweep_id} is still running (pid {holder.get('pid')} on {holder.get('host')}): end that run first"
        )
    if row["status"] == SweepStatus.FINISHED:
        raise UserError(f"SWEEP: {sweep_id} is FINISHED: nothing of it is missing; `cplab report {sweep_id}` shows it")
    if removed := row["environment"].get(SAMPLES_REMOVED):
        raise UserError(
            f"SWEEP: the samples of {sweep_id} were removed on {removed} (`cplab gc`): run its spec as a new sweep (cplab reproduce)"
        )
    if given is not None and given.spec_hash != row["spec_hash"]:
        raise UserError(
            f"SWEEP: {sweep_id} began with spec {row['spec_hash']}, SPEC is {given.spec_hash}: resume it without SPEC, or run SPEC as a new sweep"
        )
    spec = stored_spec(records, sweep_id)
    if spec.spec_hash != row["spec_hash"]:
        raise UserError(
            f"SWEEP: {sweep_id} began with spec {row['spec_hash']}, which this version reads as {spec.spec_hash}: resume it with the version of "
            f"cplab that began it (revision {row['environment'].get('revision')})"
        )
    then, now = row["environment"], environment()
    changed = [line for line in differences(code_of(then), code_of(now)) if not line.startswith("revision ")]  # the digest tells
    changed += differences(machine_of(then), machine_of(now))
    if changed:
        raise UserError(
            f"SWEEP: {sweep_id} cannot go on here ({'; '.join(changed)}): run its spec as a new sweep (cplab reproduce)"
        )
    cells = records.cells(sweep_id)
    sizes = {cell.cell_id: cell.num_ranks for cell in spec.expand().cells}
    return Resumption(
        sweep_id,
        spec,
        frozenset((cell_id, sizes[cell_id], launch) for cell_id, launch in ended_visits(records, sweep_id)),
        frozenset(str(record.cell["cell_id"]) for record in cells if record.faults),
        sum(took_s for _, took_s in records.spent(sweep_id)),
    )


def ended_visits(records: Records, sweep_id: str) -> set[tuple[str, int]]:
    """(cell_id, launch) of every visit that came to its end: its last check is the last that is written of it, and a new visit of the same
    cell in the same launch begins by removing what there is."""
    query = "SELECT cell_id, launch FROM verification WHERE sweep_id=? AND phase=?"
    return {(row["cell_id"], row["launch"]) for row in records.connection.execute(query, (sweep_id, Action.VERIFY_AFTER))}
