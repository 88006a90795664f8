"""Nights: which sweeps of the records are the nights of an experiment, and what they add up to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from experiments.names import METHODOLOGY_VERSION, SweepStatus
from service.history.series import History, NightPoints, histories_of, points_of
from service.history.store import NightStore
from service.machine import code_of, differences, machine_of
from service.store.judged import load_judged
from service.store.records import SAMPLES_REMOVED, Records

NIGHT = "night"
"""The key of a sweep's environment that makes it a night: YYYY-MM-DD, perhaps with a suffix."""


@dataclass(frozen=True)
class Night:
    """A finished sweep that stands for a night: of several, the last."""

    night: str
    sweep_id: str


def nights_of(records: Records, experiment: str, until: str | None = None) -> list[Night]:
    """The finished nights of an experiment under this methodology, in the order of their dates. `until`: with it, and none later."""
    rows = records.connection.execute(
        "SELECT json_extract(environment, '$.night'), sweep_id FROM sweep WHERE experiment=? AND status=? AND methodology_version=? "
        "AND json_extract(environment, '$.night') IS NOT NULL ORDER BY started_s, sweep_id",
        (experiment, SweepStatus.FINISHED, METHODOLOGY_VERSION),
    )
    found = {str(night): str(sweep_id) for night, sweep_id in rows}
    return [Night(night, found[night]) for night in sorted(found) if until is None or night <= until]


def histories(records: Records, store: NightStore, nights: list[Night]) -> list[History]:
    """The series that the last of these nights goes on with."""
    return histories_of([_points(records, store, night) for night in nights])


def keep_points(records: Records, store: NightStore, sweep_id: str) -> None:
    """Works out a night's points while its samples are there; nothing for a sweep that stands for no night under this methodology."""
    row = records.sweep(sweep_id)
    night = row["environment"].get(NIGHT)
    if night and row["status"] == SweepStatus.FINISHED and row["methodology_version"] == METHODOLOGY_VERSION:
        _points(records, store, Night(str(night), sweep_id))


def _points(records: Records, store: NightStore, night: Night) -> NightPoints:
    known = store.points(night.sweep_id)
    if known is None and records.sweep(night.sweep_id)["environment"].get(SAMPLES_REMOVED):
        return NightPoints(night.night, night.sweep_id, ())
    if known is None:
        known = points_of(load_judged(records, night.sweep_id), night.night)
        store.keep_points(known)
    return known


def environment_differences(records: Records, before: str, after: str) -> list[str]:
    """What is not the same of two sweeps' machines, code, systems and neighbours, in words."""
    sides = []
    for sweep_id in (before, after):
        environment = records.sweep(sweep_id)["environment"]
        launches = {"launches": records.launches(sweep_id)}
        sides.append({**code_of(environment), **machine_of({**environment, **launches}), **_system(environment)})
    return differences(*sides)


def _system(environment: Mapping[str, Any]) -> dict[str, str]:
    noted = sorted(f"{finding['subject']}: {finding['text']}" for finding in environment.get("preflight", []))
    # A load of 0.3 and one of 0.4 are no difference: whole cores count.
    return {
        "host": str(environment.get("host")),
        "kernel": str(environment.get("kernel")),
        "load before it began": f"{float(environment.get('load_1min') or 0):.0f}",
        "noted before it began": "; ".join(noted) or "nothing",
    }
