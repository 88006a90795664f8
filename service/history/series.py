"""Series: what each night measured of a cell, as four figures with their errors, kept apart wherever they mean other things."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from experiments.names import AA_ARM, BASELINE_ARM
from experiments.spec.arms import ArmSpec
from service.judge.change import JudgedSweep
from service.judge.interval import standard_error
from service.judge.judging import evidence_in, regime_of
from service.judge.results import CellRecord
from service.judge.samples import by_launch, launch_time_us, reduce_trials
from service.machine import machine_of

FIRST_FACTORS = ("schedule", "payload", "transport", "stages", "execution", "reserved_sms", "planted_wait_us")
"""Those that arms had when the first nights were kept."""


class Kind(StrEnum):
    """The series of a cell."""

    BASELINE = "baseline"
    """log of the baseline's time, us a layer."""
    ARM = "arm"
    """log of the arm's time, us a layer."""
    RATIO = "ratio"
    """log of the published `time_ratio`."""
    AA = "aa"
    """log of the ratio of the baseline's second copy to the first: 0 on a sound night."""


@dataclass(frozen=True)
class Value:
    """One night's figure.

    Attributes:
        log: The mean over launches of the launches' logarithms.
        error: Its standard error over launches.
    """

    log: float
    error: float
    launches: int


@dataclass(frozen=True)
class Point:
    """One night of one cell and arm."""

    night: str
    sweep_id: str
    values: Mapping[Kind, Value]


@dataclass(frozen=True)
class Key:
    """What points must share to stand in one series.

    Attributes:
        setting: Digest of the methodology, the machine and the baseline's factors.
    """

    setting: str
    cell_id: str
    arm: str


@dataclass(frozen=True)
class History:
    """One cell and arm over its nights, oldest first."""

    key: Key
    label: str
    points: tuple[Point, ...]

    def of(self, kind: Kind) -> list[Value]:
        return [point.values[kind] for point in self.points]


@dataclass(frozen=True)
class NightPoints:
    """What one night adds to the series."""

    night: str
    sweep_id: str
    rows: tuple[tuple[Key, str, Point], ...]
    """(key, the cell's label, point)."""


def points_of(sweep: JudgedSweep, night: str) -> NightPoints:
    """A night's points; an INVALID cell, or one of a single launch, has none."""
    rows = []
    for record in sweep.records:
        setting = _setting(sweep, record)
        evidence = evidence_in(record, sweep.spec)
        times = _launch_logs(record)
        aa = evidence.get(AA_ARM)
        for name in sweep.spec.arms:
            found = evidence.get(name)
            if name == BASELINE_ARM or found is None or BASELINE_ARM not in times or name not in times:
                continue
            values = {
                Kind.BASELINE: _value(times[BASELINE_ARM]),
                Kind.ARM: _value(times[name]),
                Kind.RATIO: _value(found.logs),
                **({Kind.AA: _value(aa.logs)} if aa is not None else {}),
            }
            key = Key(setting, str(record.cell["cell_id"]), name)
            rows.append((key, str(record.cell["label"]), Point(night, sweep.result.sweep_id, values)))
    return NightPoints(night, sweep.result.sweep_id, tuple(rows))


def histories_of(nights: Iterable[NightPoints]) -> list[History]:
    """The series that the last of `nights` (oldest first) goes on with, in the order of its cells."""
    found: dict[Key, list[Point]] = {}
    last: tuple[tuple[Key, str, Point], ...] = ()
    for night in nights:
        last = night.rows
        for key, _, point in night.rows:
            found.setdefault(key, []).append(point)
    return [History(key, label, tuple(found[key])) for key, label, _ in last]


def _value(logs: Sequence[float]) -> Value:
    return Value(math.fsum(logs) / len(logs), standard_error(logs), len(logs))


def _launch_logs(record: CellRecord) -> dict[str, list[float]]:
    """Variant -> log of each launch's time of it; nothing for an INVALID cell."""
    if record.faults:
        return {}
    regime, logs = regime_of(record), dict[str, list[float]]()
    samples = [s for s in reduce_trials(record.trials, regime) if s.kind == "arms"]
    for launch in by_launch(samples).values():
        for variant in {s.variant for s in launch}:
            passes = [s for s in launch if s.variant == variant]
            logs.setdefault(variant, []).append(math.log(launch_time_us(passes, regime)))
    return {variant: found for variant, found in logs.items() if len(found) > 1}


def _setting(sweep: JudgedSweep, record: CellRecord) -> str:
    other_sizes = f"cp_size {record.cell['cp_size']}"
    machine = {
        name: value
        for name, value in machine_of(sweep.result.environment).items()
        if not name.startswith("cp_size ") or name == other_sizes
    }
    baseline = factors_of(sweep.spec.arms[BASELINE_ARM])
    parts: dict[str, Any] = {"methodology": sweep.result.methodology_version, "machine": machine, "baseline": baseline}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def factors_of(arm: ArmSpec) -> dict[str, Any]:
    """The factors that tell one setting from another. One that came later counts only where it is not at its default: the nights from before it
    go on."""
    changed = arm.model_dump(mode="json", exclude_defaults=True)
    return {name: value for name, value in arm.model_dump(mode="json").items() if name in FIRST_FACTORS or name in changed}
