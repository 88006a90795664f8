"""Reads back what was published to MLflow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from service.judge.results import SweepResult
from service.store.home import Home
from service.store.planned_run import KEY_TAG


def client_of(home: Home) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(home.tracking_uri)


def runs_of(home: Home) -> list[Any]:
    client = client_of(home)
    ids = [e.experiment_id for e in client.search_experiments()]
    return list(client.search_runs(ids, max_results=1000))


def by_key(home: Home) -> dict[str, Any]:
    runs = runs_of(home)
    keys = [run.data.tags[KEY_TAG] for run in runs]
    assert len(set(keys)) == len(keys), "a run is there twice"
    return dict(zip(keys, runs, strict=True))


def artifact(home: Home, run: Any, name: str) -> Path:
    (path,) = home.artifacts.rglob(f"{run.info.run_id}/artifacts/{name}")
    return path


def expected_keys(result: SweepResult) -> set[str]:
    arms = {f"{result.sweep_id}/{cell.cell['cell_id']}/{arm.arm}" for cell in result.cells for arm in cell.arms}
    return arms | {f"{result.sweep_id}/summary"}
