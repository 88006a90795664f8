"""`cplab gc`: gives back room, and closes what was left open."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.errors import ExitCode, InfrastructureError
from service.exits import exits

if TYPE_CHECKING:
    from service.nightly.retention import Piece, Plan
    from service.store.home import Home
    from service.store.records import Records

TRACES_DAYS = 30.0
SAMPLES_DAYS = 180.0


@exits
def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done; do nothing.")] = False,
    traces_days: Annotated[float, typer.Option(help="Traces older than that go.", min=0)] = TRACES_DAYS,
    samples_days: Annotated[
        float, typer.Option(help="Samples older than that go: their sweeps can not be judged again.", min=0)
    ] = SAMPLES_DAYS,
) -> ExitCode:
    """Removes old traces and samples, except of regressed and blessed nights, and closes what died RUNNING."""
    from service.history.store import NightStore
    from service.nightly.leftovers import measured_now
    from service.nightly.retention import What, plan_retention
    from service.store.home import open_home
    from service.store.records import Records

    home = open_home()
    with contextlib.closing(Records(home.records)) as records, contextlib.closing(NightStore(home.folder)) as nights:
        if (busy := measured_now(records)) and not dry_run:
            raise InfrastructureError(
                f"sweep {busy[0]} is being measured in {home.folder}: gc would disturb its times; nothing was done"
            )
        client = _client(home)
        closed = _close(records, home, client, dry_run)
        folder_of = _folder_of(home, client)
        plan = plan_retention(records, nights, home, {What.TRACES: traces_days, What.SAMPLES: samples_days}, folder_of)
        print("\n".join(closed + _lines(plan)))
        if not dry_run:
            from service.nightly.retention import give_back_room, remove

            for piece in plan.pieces:
                remove(records, nights, home, piece, folder_of)
            if plan.pieces:
                give_back_room(records)
        print(_sum(plan.pieces, len(closed), dry_run))
    return ExitCode.FINE


def _close(records: Records, home: Home, client: Any, dry_run: bool) -> list[str]:
    """Closes sweeps and runs; what was closed, a line each."""
    import filelock

    from service.nightly.leftovers import DRIVER_GONE, abandoned, close_run, end_abandoned, left_runs
    from service.store.mlflow_store import lock_path

    lines = []
    for sweep_id, last_s in abandoned(records):
        lines.append(f"close    sweep {sweep_id}: KILLED, {DRIVER_GONE}; `cplab sync` publishes it")
        if not dry_run:
            end_abandoned(records, sweep_id, last_s)
    if client is None:
        return lines
    # Whoever publishes holds it, and has runs that are RUNNING for a good reason.
    with filelock.FileLock(lock_path(home), 120):
        for run in left_runs(records, client):
            lines.append(f"close    MLflow run {run.name} ({run.run_id}) of sweep {run.sweep_id}: {run.status}")
            if not dry_run:
                close_run(client, run)
    return lines


def _client(home: Home) -> Any:
    """MLflow's; None where there is no store yet, which asking would make.

    Raises:
        InfrastructureError: It is out of reach: nothing is removed behind its back.
    """
    from service.store.mlflow_store import configure_mlflow, explain, failures, sqlite_path

    path = sqlite_path(home.tracking_uri)
    if path is not None and not path.exists():
        return None
    configure_mlflow()
    from mlflow.tracking import MlflowClient

    try:
        client = MlflowClient(tracking_uri=home.tracking_uri)
        client.search_experiments(max_results=1)
    except failures() as error:
        raise InfrastructureError(f"{explain(home.tracking_uri, error)}; nothing was done") from error
    return client


def _folder_of(home: Home, client: Any) -> Callable[[str], Sequence[Path]]:
    from service.nightly.retention import artifact_folders

    @cache
    def folders(sweep_id: str) -> Sequence[Path]:
        if client is None:
            return ()
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        runs = client.search_runs(experiments, f"tags.sweep_id = '{sweep_id}'", max_results=10_000)
        return artifact_folders(home, [run.info.artifact_uri for run in runs])

    return folders


def _lines(plan: Plan) -> list[str]:
    lines = []
    for piece in plan.pieces:
        night = f", night {piece.night}" if piece.night else ""
        lines.append(
            f"{piece.what:8s} {piece.sweep_id} {piece.experiment}{night}, {piece.age_days:.0f} days old: {_size(piece.num_bytes)}"
        )
    return lines + [f"keep     {number} old sweeps: {why}" for why, number in sorted(plan.kept.items())]


def _sum(pieces: Sequence[Piece], num_closed: int, dry_run: bool) -> str:
    what = f"{len(pieces)} pieces, {_size(sum(piece.num_bytes for piece in pieces))}; {num_closed} left open"
    return f"would be removed or closed: {what}; nothing was done" if dry_run else f"removed or closed: {what}"


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:.1f} MiB" if num_bytes >= 2**20 else f"{num_bytes / 2**10:.1f} KiB"
