"""Publishing: a sweep's records as MLflow runs, after the timing, by the driver alone, each run exactly once.

Records come first and MLflow is a view on them, so a store that is down, or a driver that dies half-way, costs a repeat and
nothing else. A repeat keeps what is complete and makes the rest anew.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.spec.experiment import ExperimentSpec
from service.judge.results import SweepResult
from service.judge.samples import Trial
from service.report.dossier import dossier_of
from service.report.json_report import json_text, result_json
from service.report.page import page
from service.store.extract import FILE_NAME, extract_sweep
from service.store.finishing import finish
from service.store.home import Home
from service.store.mlflow_store import (
    TrackingError,
    TrackingStore,
    configure_mlflow,
    explain,
    failures,
    lock_path,
    open_store,
    shown,
)
from service.store.note import full_table
from service.store.parquet import arm_trials, write_samples
from service.store.planned_run import COMPLETE_TAG, KEY_TAG, PlannedRun, plan_runs
from service.store.records import Records
from service.store.source import lanes_of
from service.store.trace_files import PICTURE_FILE, write_trace_files

__all__ = ["Published", "TrackingError", "publish"]

LOCK_TIMEOUT_S = 120
REMOTE_THREADS = 4
"""Requests in flight to a server. SQLite has one writer, so an embedded store gets one thread."""


@dataclass(frozen=True)
class Published:
    """What a publication did.

    Attributes:
        uri: The store, without credentials.
        seconds: Wall time, the import of MLflow included.
    """

    uri: str
    experiment_id: str
    summary_run_id: str
    num_runs_created: int
    num_runs_kept: int
    seconds: float


def publish(records: Records, sweep_id: str, result: SweepResult, home: Home) -> Published:
    """Brings an ended sweep into the tracking store and marks it published. Safe to repeat, also after a crash anywhere.

    Raises:
        UserError: There is no such sweep.
        TrackingError: The sweep has not ended, or the store is out of reach or failed; the sweep stays unpublished.
    """
    started = time.monotonic()
    row = records.sweep(sweep_id)
    if row["ended_s"] is None:
        raise TrackingError(f"sweep {sweep_id} has not ended")
    configure_mlflow()
    import filelock

    uri = home.tracking_uri
    try:
        spec = ExperimentSpec.model_validate(row["spec"])
        runs = plan_runs(row, spec, result, records.cell_spans(sweep_id))
        traces = write_trace_files(home, records, result)
        write_artifacts = _artifact_writer(row, spec, result, records, home, traces)
        with filelock.FileLock(lock_path(home), LOCK_TIMEOUT_S):
            store = open_store(home, spec.suite)
            kept, created = _Publication(store, sweep_id, write_artifacts).bring(runs)
            finish(store, records, result, home, {**kept, **created}, frozenset(traces))
    except TrackingError:
        raise
    except failures() as error:
        raise explain(uri, error) from error
    records.mark_published(sweep_id, uri)
    summary = runs[-1].key
    return Published(
        uri=shown(uri),
        experiment_id=store.experiment_id,
        summary_run_id={**kept, **created}[summary],
        num_runs_created=len(created),
        num_runs_kept=len(kept),
        seconds=time.monotonic() - started,
    )


class _Publication:
    """One sweep on its way into one store."""

    def __init__(self, store: TrackingStore, sweep_id: str, write_artifacts: Callable[[PlannedRun, Path], None]) -> None:
        self._store, self._sweep_id, self._write_artifacts = store, sweep_id, write_artifacts

    def bring(self, runs: Sequence[PlannedRun]) -> tuple[dict[str, str], dict[str, str]]:
        """Run ids by key: those that were complete, and those made now."""
        kept = self._keep_complete(runs)
        missing = [run for run in runs if run.key not in kept]
        arms, summary = [run for run in missing if run.role != "summary"], [run for run in missing if run.role == "summary"]
        if self._store.is_remote:
            with ThreadPoolExecutor(REMOTE_THREADS) as pool:
                ids = list(pool.map(self._create, arms))
        else:
            ids = [self._create(run) for run in arms]
        ids += [self._create(run) for run in summary]  # after the arms: where it stands, all of them do
        created = dict(zip((run.key for run in [*arms, *summary]), ids, strict=True))
        if created and self._store.is_remote:
            # A request whose answer was lost is sent again, and can have made a run twice.
            ours = {*kept.values(), *ids}
            self._delete(run.info.run_id for run in self._existing() if run.info.run_id not in ours)
        return kept, created

    def _existing(self) -> list[Any]:
        runs: list[Any] = []
        token: str | None = None
        while True:
            page = self._store.client.search_runs(
                [self._store.experiment_id], f"tags.sweep_id = '{self._sweep_id}'", max_results=1000, page_token=token
            )
            runs += [run for run in page if KEY_TAG in run.data.tags]
            token = page.token
            if not token:
                return runs

    def _keep_complete(self, runs: Sequence[PlannedRun]) -> dict[str, str]:
        """The complete runs that are there, one for each key; everything else of the sweep is deleted."""
        status = {run.key: run.status for run in runs}
        kept: dict[str, str] = {}
        stray: list[str] = []
        for run in self._existing():
            key = run.data.tags[KEY_TAG]
            is_complete = COMPLETE_TAG in run.data.tags and run.info.status == status.get(key)
            if is_complete and key not in kept:
                kept[key] = run.info.run_id
            else:
                stray.append(run.info.run_id)
        self._delete(stray)
        return kept

    def _delete(self, run_ids: Iterable[str]) -> None:
        for run_id in run_ids:
            self._store.client.delete_run(run_id)

    def _create(self, run: PlannedRun) -> str:
        """One run, whole: the artifacts first, the mark of completeness with the metrics, the status last."""
        from mlflow.entities import Metric, Param, RunTag

        client = self._store.client
        run_id: str = client.create_run(
            self._store.experiment_id,
            start_time=run.start_ms,
            tags={KEY_TAG: run.key, "sweep_id": self._sweep_id},
            run_name=run.name,
        ).info.run_id
        with tempfile.TemporaryDirectory(prefix="cplab-publish-") as folder:
            self._write_artifacts(run, Path(folder))
            client.log_artifacts(run_id, folder)
        client.log_batch(
            run_id,
            metrics=[
                *(Metric(name, value, run.end_ms, 0) for name, value in run.metrics.items()),
                *(Metric(name, value, run.end_ms, step) for name, points in run.series.items() for step, value in points),
            ],
            params=[Param(name, value) for name, value in run.params.items()],
            tags=[RunTag(name, value) for name, value in {**run.tags, COMPLETE_TAG: "true"}.items()],
        )
        client.set_terminated(run_id, run.status, run.end_ms)
        return run_id


def _artifact_writer(
    row: Mapping[str, Any],
    spec: ExperimentSpec,
    result: SweepResult,
    records: Records,
    home: Home,
    traces: Mapping[str, Sequence[Path]],
) -> Callable[[PlannedRun, Path], None]:
    """A function that writes a run's artifacts into a folder."""
    import yaml

    shared = {
        "spec.yaml": yaml.safe_dump(row["spec"], sort_keys=False),
        "environment.json": json_text(result.environment),
    }
    trials: dict[str, Sequence[Trial]] = {record.cell["cell_id"]: record.trials for record in records.cells(row["sweep_id"])}

    def write(run: PlannedRun, folder: Path) -> None:
        for name, text in shared.items():
            (folder / name).write_text(text)
        if run.role == "arm":
            identity = ("sweep_id", "cell_id", "arm", "methodology_version", "verdict", "emulated", "simulated")
            about = {name: run.tags[name] for name in identity}
            write_samples(folder / "samples.parquet", arm_trials(trials[run.cell_id], run.arm), about)
            for file in traces.get(run.cell_id, ()):
                shutil.copy(file, folder)
        elif run.role == "summary":
            (folder / "table.md").write_text(full_table(result))
            (folder / "result.json").write_text(result_json(result))
            (folder / FILE_NAME).write_bytes(extract_sweep(records, result.sweep_id))
            lanes_png = lanes_of(home, result.sweep_id)
            if lanes_png is not None:
                (folder / PICTURE_FILE).write_bytes(lanes_png)
            dossier = dossier_of(records, result.sweep_id, result, f"the records at {home.records}", lanes_png)
            (folder / "report.html").write_text(page(dossier))

    return write
