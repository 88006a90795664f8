"""History runs: one for each (cell, arm, machine, methodology), its metrics stepped by night. Trends need their steps inside one run.

They are worked out anew from the records by whoever publishes a night, so a night that was measured again, or published late, finds its place.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from service.history.nights import NIGHT, histories, nights_of
from service.history.series import History, Kind, Value
from service.history.store import NightStore
from service.judge.interval import t_quantile
from service.store.columns import COLOR_TAG, NIGHTS_SERIES, PLACE_TAG, SERIES_TAG, ratio_text, shape
from service.store.home import Home
from service.store.palette import series_color
from service.store.records import Records

HISTORY_TAG = "cplab.history"
"""Unique in the store: experiment, setting, cell and arm."""

CARRIED_TAGS = (
    *("experiment", "suite", "methodology_version", "revision", "rev", "dirty", "hosts", "verdict", "fabric"),
    *("emulated", "simulated", "device", "split", "cp_size", "scope", "regime", "dims", "cell_id", "arm"),
)
"""What a history run says of its last night: the tags of the arm's run in it."""

INTERVAL = 0.95
"""Of one night's ratio by itself; what a night is judged by is stricter (experiments/METHODOLOGY.md, section 12)."""


@dataclass(frozen=True)
class Step:
    """One value of a metric: of the `step`-th night, at the time of its start."""

    step: int
    time_ms: int
    value: float


@dataclass(frozen=True)
class HistoryRun:
    """One history as MLflow will hold it.

    Attributes:
        sweep_id: Of its last night.
        steps: Metric -> values, oldest first.
    """

    key: str
    sweep_id: str
    cell_id: str
    arm: str
    name: str
    tags: Mapping[str, str]
    steps: Mapping[str, Sequence[Step]]

    @property
    def start_ms(self) -> int:
        return min(step.time_ms for steps in self.steps.values() for step in steps)

    @property
    def end_ms(self) -> int:
        return max(step.time_ms for steps in self.steps.values() for step in steps)


def plan_histories(records: Records, home: Home, sweep_id: str) -> list[HistoryRun]:
    """The histories of the experiment that a night belongs to, up to its last night; none for a sweep that is no night."""
    row = records.sweep(sweep_id)
    if not row["environment"].get(NIGHT):
        return []
    experiment = str(row["experiment"])
    nights = nights_of(records, experiment)
    if not nights:
        return []
    store = NightStore(home.folder)
    try:
        found = histories(records, store, nights)
    finally:
        store.close()
    starts = {night.sweep_id: round(records.sweep(night.sweep_id)["started_s"] * 1000) for night in nights}
    return [_history_run(experiment, history, position, len(found), starts) for position, history in enumerate(found)]


def _history_run(experiment: str, history: History, position: int, count: int, starts: Mapping[str, int]) -> HistoryRun:
    steps: dict[str, list[Step]] = {}
    for number, point in enumerate(history.points, 1):
        for name, value in _figures(point.values).items():
            steps.setdefault(f"nights/{name}", []).append(Step(number, starts[point.sweep_id], value))
    last = _figures(history.points[-1].values)
    key = history.key
    return HistoryRun(
        key=f"{experiment}/{key.setting}/{key.cell_id}/{key.arm}",
        sweep_id=history.points[-1].sweep_id,
        cell_id=key.cell_id,
        arm=key.arm,
        name=f"{key.arm} over nights, {shape(history.label)}",
        tags={
            "sweep_id": history.points[-1].sweep_id,
            "night": history.points[-1].night,
            "role": "history",
            SERIES_TAG: NIGHTS_SERIES,
            "shape": shape(history.label),
            "nights": str(len(history.points)),
            "setting": key.setting,
            "ratio": ratio_text(last["ratio"], last["low"], last["high"]),
            PLACE_TAG: f"3.{position:04d}",
            COLOR_TAG: series_color(position, count),
        },
        steps=steps,
    )


def _figures(values: Mapping[Kind, Value]) -> dict[str, float]:
    """A night's point as numbers that people read: ratios, and times in us a layer."""
    ratio = values[Kind.RATIO]
    half = t_quantile(INTERVAL, ratio.launches - 1) * ratio.error
    figures = {
        "ratio": math.exp(ratio.log),
        "low": math.exp(ratio.log - half),
        "high": math.exp(ratio.log + half),
        "base_us": math.exp(values[Kind.BASELINE].log),
        "arm_us": math.exp(values[Kind.ARM].log),
    }
    return figures | ({"aa": math.exp(values[Kind.AA].log)} if Kind.AA in values else {})


def publish_histories(client: Any, experiment_id: str, planned: Sequence[HistoryRun]) -> dict[str, str]:
    """Brings them up to date; key -> run id. Hold the lock.

    Values are added to a run that has none but the planned ones; else it is made anew, since MLflow keeps what was once logged.
    """
    return {run.key: _bring(client, experiment_id, run) for run in planned}


def _bring(client: Any, experiment_id: str, planned: HistoryRun) -> str:
    tags = {**planned.tags, **_of_the_last_night(client, experiment_id, planned)}
    same = f"tags.`{HISTORY_TAG}` = '{planned.key}'"
    kept: str | None = None
    for run in client.search_runs([experiment_id], same, order_by=["attributes.start_time ASC"]):
        missing = None if kept else _missing(client, run.info.run_id, planned)
        if missing is None:
            client.delete_run(run.info.run_id)
        else:
            kept = run.info.run_id
            _log(client, run.info.run_id, missing, {name: text for name, text in tags.items() if run.data.tags.get(name) != text})
            client.set_terminated(run.info.run_id, "FINISHED", planned.end_ms)
    if kept is None:
        begun = client.create_run(
            experiment_id, start_time=planned.start_ms, tags={HISTORY_TAG: planned.key}, run_name=planned.name
        )
        kept = str(begun.info.run_id)
        _log(client, kept, planned.steps, tags)
        client.set_terminated(kept, "FINISHED", planned.end_ms)
    return kept


def _missing(client: Any, run_id: str, planned: HistoryRun) -> dict[str, list[Step]] | None:
    """What the run lacks; None where it holds something that was not planned."""
    missing = {}
    for name, steps in planned.steps.items():
        there = {(point.step, point.timestamp, point.value) for point in client.get_metric_history(run_id, name)}
        if there - {(step.step, step.time_ms, step.value) for step in steps}:
            return None
        missing[name] = [step for step in steps if (step.step, step.time_ms, step.value) not in there]
    return missing


def _log(client: Any, run_id: str, steps: Mapping[str, Sequence[Step]], tags: Mapping[str, str]) -> None:
    from mlflow.entities import Metric, RunTag
    from mlflow.utils.validation import MAX_METRICS_PER_BATCH

    metrics = [Metric(name, step.value, step.time_ms, step.step) for name, found in steps.items() for step in found]
    for start in range(0, len(metrics), MAX_METRICS_PER_BATCH):
        client.log_batch(run_id, metrics=metrics[start : start + MAX_METRICS_PER_BATCH])
    if tags:
        client.log_batch(run_id, tags=[RunTag(name, text) for name, text in tags.items()])


def _of_the_last_night(client: Any, experiment_id: str, planned: HistoryRun) -> dict[str, str]:
    """The identity of the arm's run in it."""
    night = f"tags.sweep_id = '{planned.sweep_id}' AND tags.role = 'arm'"
    found = client.search_runs(
        [experiment_id], f"{night} AND tags.cell_id = '{planned.cell_id}' AND tags.arm = '{planned.arm}'", max_results=1
    )
    return {name: found[0].data.tags[name] for name in CARRIED_TAGS if name in found[0].data.tags} if found else {}
