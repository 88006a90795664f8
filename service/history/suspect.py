"""Suspects: a night read against the nights before it. Which series moved together says who is to be asked.

The ratio moved and the times' common level did not: code. Both arms moved: environment. The baseline's second copy moved against the first: neither,
the night measured something else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from statistics import median
from typing import Any

import numpy as np

from service.history.change_points import Scatter, Step, find_steps, launch_variances, level, scatter_of
from service.history.series import History, Key, Kind, Point, Value
from service.judge.interval import t_quantile, two_sided_p

WINDOW_NIGHTS = 45
"""How far back nights are read. More make the search slower and the reference hardly better."""

MIN_NIGHTS = 7
"""Nights, the last included, before a series is judged: with fewer nobody knows how much nights differ."""

NIGHT_ERROR = 0.01
"""False alarms that a whole quiet night may raise: half of it by ratios, a quarter by times, a quarter by A/A pairs."""

LOOKS = 3
"""A step may show on its first, second or third night; each look spends its share."""

MOVED_ERROR = 0.005
"""At which the times count as moved when a ratio has already: one question at a known place."""

BIRTH_NIGHTS = 10
"""A step that has not been named after so many nights is not named any more: old nights are not searched again and again."""

SAME_STEP_NIGHTS = 3
"""What a step's first night may shift by as nights are added."""

MIN_REFERENCE = 5
"""Nights before a step that it needs."""

REFERENCE_NIGHTS = 10
"""Nights before a step that the times are held against: near enough that a slow drift does not pass for a move."""


class Suspect(StrEnum):
    CODE = "code"
    ENVIRONMENT = "environment"
    NEITHER = "neither"


@dataclass(frozen=True)
class Move:
    """How far a series moved at a given night, as logarithms."""

    log: float
    error: float

    @property
    def pct(self) -> float:
        return 100 * math.expm1(self.log)


@dataclass(frozen=True)
class Finding:
    """Something that began on one night.

    Attributes:
        label, arm: The cell's and the arm's; empty where all cells moved together.
        ratio: The move of the ratio; None where only times moved.
        baseline, other: The moves of the baseline's and of the arm's time at that night.
        last_good, first_bad: The nights on either side.
        nights: How many nights stand on the new level.
        before: The ratio's level before it, a logarithm, for nights that no longer see that far back.
        setting: The series' (see `Key`).
    """

    suspect: Suspect
    label: str
    cell_id: str
    arm: str
    ratio: Move | None
    baseline: Move | None
    other: Move | None
    last_good: Point
    first_bad: Point
    nights: int
    before: float = 0.0
    setting: str = ""

    @property
    def is_new(self) -> bool:
        """Whether it began within the looks that a step is given."""
        return self.nights <= LOOKS

    @property
    def is_worse(self) -> bool:
        return self.ratio is not None and self.ratio.log > 0


@dataclass(frozen=True)
class Reading:
    """What the last night says beside the nights before it.

    Attributes:
        findings: Open ones: not recovered, and not older than the blessed night.
        untrusted: (label, p) of cells whose A/A pair moved on the last night.
        young: Labels of cells with too few nights to be judged.
        judged: How many series of a ratio were.
        detectable_pct: By cell and arm: the step that the last night would have shown with an even chance.
    """

    findings: tuple[Finding, ...]
    untrusted: tuple[tuple[str, float], ...]
    young: tuple[str, ...]
    judged: int
    detectable_pct: Mapping[Key, float]


def read_night(
    histories: Sequence[History], minimum_pct: float, blessed: str | None = None, carried: Sequence[Finding] = ()
) -> Reading:
    """The last night of these series.

    Args:
        minimum_pct: Steps below it are not named.
        blessed: A night: what began on it or before is accepted.
        carried: The findings of the night before.
    """
    recent = [History(h.key, h.label, h.points[-WINDOW_NIGHTS:]) for h in histories]
    young = [h for h in recent if len(h.points) < MIN_NIGHTS]
    old = [h for h in recent if len(h.points) >= MIN_NIGHTS]
    worse = [f for f in carried if f.is_worse]
    # What was not measured on this night has not recovered on it.
    measured = {(h.key.cell_id, h.key.arm) for h in recent}
    findings = [f for f in worse if (f.cell_id, f.arm) not in measured]
    night = _Night(old, minimum_pct, worse) if old else None
    if night is not None:
        findings += [f for h in old for f in night.of_cell(h)] + night.of_all()
    return Reading(
        findings=tuple(f for f in findings if blessed is None or f.first_bad.night > blessed),
        untrusted=_untrusted(recent),
        young=tuple(h.label for h in young),
        judged=len(old),
        detectable_pct={h.key: night.detectable_pct(h) for h in old} if night is not None else {},
    )


class _Night:
    """The scatter of all series together, and the levels that go with their number."""

    def __init__(self, histories: Sequence[History], minimum_pct: float, carried: Sequence[Finding]) -> None:
        self._minimum_pct, self._minimum, self._carried = minimum_pct, math.log1p(minimum_pct / 100), carried
        self._ratios = scatter_of([h.of(Kind.RATIO) for h in histories], shares_nights=False)
        self._times = scatter_of([h.of(kind) for h in histories for kind in (Kind.BASELINE, Kind.ARM)], shares_nights=True)
        self._ratio_error = NIGHT_ERROR / 2 / LOOKS / len(histories)
        self._pools = _pools(histories)
        self._pool_scatter = {setting: scatter_of([values], True) for setting, (_, values) in self._pools.items()}
        self._time_error = NIGHT_ERROR / 4 / LOOKS / (len(histories) + len(self._pools))
        self._pool_steps = {
            setting: find_steps(values, self._pool_scatter[setting], self._time_error, minimum_pct)
            for setting, (_, values) in self._pools.items()
        }

    def of_cell(self, history: History) -> list[Finding]:
        """Open moves of a cell's ratio, and of its times where the ratio held."""
        steps = find_steps(history.of(Kind.RATIO), self._ratios, self._ratio_error, self._minimum_pct)
        known = [f for f in self._carried if Key(f.setting, f.cell_id, f.arm) == history.key]
        places = {f.first_bad.night: place for f in known if (place := _place(history, f.first_bad.night)) is not None}
        found = [self._finding(history, step) for step in steps if self._is_open(history, step, steps, list(places.values()))]
        found += [
            again for f in known if places.get(f.first_bad.night, 0) < MIN_REFERENCE and (again := self._still(history, f, steps))
        ]
        return found + self._of_times(history, steps)

    def _of_times(self, history: History, ratio_steps: Sequence[Step]) -> list[Finding]:
        """New moves of both arms that neither came with one of the ratio nor with one of all cells: those are said there."""
        times = [find_steps(history.of(k), self._times, self._time_error, self._minimum_pct) for k in (Kind.BASELINE, Kind.ARM)]
        said = [s.first for s in (*ratio_steps, *self._pool_steps.get(history.key.setting, []))]
        return [
            self._finding(history, step, of_times=True)
            for step in times[0]
            if len(history.points) - step.first <= LOOKS
            and any(abs(step.first - s.first) <= 1 and s.log * step.log > 0 for s in times[1])
            and not any(abs(step.first - first) < LOOKS for first in said)
        ]

    def of_all(self) -> list[Finding]:
        """New moves of all cells' times together."""
        found = []
        for setting, (points, values) in self._pools.items():
            for step in self._pool_steps[setting]:
                nights = len(values) - step.first
                if nights <= LOOKS:
                    move = Move(step.log, step.error)
                    ends = points[step.first - 1], points[step.first]
                    found.append(Finding(Suspect.ENVIRONMENT, "", "", "", None, move, move, *ends, nights))
        return found

    def detectable_pct(self, history: History) -> float:
        values = history.of(Kind.RATIO)
        variances = launch_variances(values)
        error = math.sqrt(self._ratios.inflation * (variances[-1] + 1 / sum(1 / v for v in variances[:-1])))
        return 100 * math.expm1(t_quantile(1 - self._ratio_error, self._ratios.degrees) * error)

    def _is_open(self, history: History, step: Step, steps: Sequence[Step], known: Sequence[int]) -> bool:
        """A move for the worse stays open until the level is back; one for the better is news for a few nights."""
        nights = len(history.points) - step.first
        is_last = step is steps[-1]
        if step.log < 0:
            return is_last and nights <= LOOKS
        is_born = nights <= BIRTH_NIGHTS or any(abs(place - step.first) <= SAME_STEP_NIGHTS for place in known)
        return step.first >= MIN_REFERENCE and is_born and (is_last or steps[-1].after - step.before >= self._minimum)

    def _still(self, history: History, finding: Finding, steps: Sequence[Step]) -> Finding | None:
        """A finding from before the nights that are read, unless the level is back."""
        values = history.of(Kind.RATIO)
        start = steps[-1].first if steps else 0
        now, _ = level(_logs(values), np.array(launch_variances(values)), start, len(values))
        if now - finding.before < self._minimum:
            return None
        assert finding.ratio is not None
        return replace(finding, ratio=Move(now - finding.before, finding.ratio.error), nights=finding.nights + 1)

    def _finding(self, history: History, step: Step, of_times: bool = False) -> Finding:
        first, points = step.first, history.points
        pooled = self._pool_steps.get(history.key.setting, [])
        baseline, other = (_move(history.of(kind), self._times, first, pooled) for kind in (Kind.BASELINE, Kind.ARM))
        aa_moved = any(_aa_p(points[i]) < NIGHT_ERROR / 4 for i in {first, len(points) - 1})
        if of_times or self._environment_moved(history, baseline, other, first):
            suspect = Suspect.ENVIRONMENT
        else:
            suspect = Suspect.NEITHER if aa_moved else Suspect.CODE
        ratio = None if of_times else Move(step.log, step.error)
        ends = points[first - 1], points[first]
        about = history.label, history.key.cell_id, history.key.arm
        return Finding(suspect, *about, ratio, baseline, other, *ends, len(points) - first, step.before, history.key.setting)

    def _environment_moved(self, history: History, baseline: Move, other: Move, first: int) -> bool:
        """Whether both arms of the cell, or all cells, moved at that night."""
        if self._has_moved(baseline, self._times) and other.log * baseline.log > 0 and self._has_moved(other, self._times):
            return True
        pool = self._pools.get(history.key.setting)
        place = None if pool is None else next((i for i, p in enumerate(pool[0]) if p.night == history.points[first].night), None)
        if pool is None or not place:
            return False
        steps, scatter = self._pool_steps[history.key.setting], self._pool_scatter[history.key.setting]
        return any(abs(s.first - place) <= 1 for s in steps) or self._has_moved(_move(pool[1], scatter, place, steps), scatter)

    def _has_moved(self, move: Move, scatter: Scatter) -> bool:
        return abs(move.log) >= self._minimum and abs(move.log) > t_quantile(1 - MOVED_ERROR, scatter.degrees) * move.error


def _move(values: Sequence[Value], scatter: Scatter, first: int, steps: Sequence[Step]) -> Move:
    """From the nights before position `first`, as far back as the last of `steps`, to it and those behind it, at most LOOKS of them."""
    start = max([0, first - REFERENCE_NIGHTS, *(step.first for step in steps if step.first < first)])
    end = min(len(values), first + LOOKS)
    logs, variances = _logs(values), np.array(launch_variances(values)) * scatter.inflation
    (before, u), (after, v) = level(logs, variances, start, first), level(logs, variances, first, end)
    return Move(after - before, math.sqrt(u + v))


def _logs(values: Sequence[Value]) -> Any:
    return np.array([value.log for value in values])


def _place(history: History, night: str) -> int | None:
    return next((i for i, point in enumerate(history.points) if point.night == night), None)


def _pools(histories: Sequence[History]) -> dict[str, tuple[list[Point], list[Value]]]:
    """Setting -> nights, and the median over its cells of how far each cell's baseline is from its own middle; where there are two cells at least."""
    pools = {}
    for setting in {h.key.setting for h in histories}:
        cells = {h.key.cell_id: h for h in histories if h.key.setting == setting}
        if len(cells) < 2:
            continue
        nights: dict[str, list[Value]] = {}
        points: dict[str, Point] = {}
        for history in cells.values():
            values = history.of(Kind.BASELINE)
            middle = median(value.log for value in values)
            for point, value in zip(history.points, values, strict=True):
                nights.setdefault(point.night, []).append(Value(value.log - middle, value.error, value.launches))
                points.setdefault(point.night, point)
        ordered = sorted(nights)
        pools[setting] = [points[night] for night in ordered], [_middle(nights[night]) for night in ordered]
    return pools


def _middle(values: Sequence[Value]) -> Value:
    """The median over cells, which one cell that moves by itself does not take along; its error as if cells were normal (that of a mean, and a
    quarter)."""
    n = len(values)
    error = math.sqrt(math.fsum(value.error**2 for value in values)) / n * (1.2533 if n > 2 else 1.0)
    return Value(median(value.log for value in values), error, min(value.launches for value in values))


def _untrusted(histories: Sequence[History]) -> tuple[tuple[str, float], ...]:
    cells = {h.key.cell_id: h for h in histories}
    level_each = NIGHT_ERROR / 4 / max(len(cells), 1)
    return tuple((h.label, p) for h in cells.values() if (p := _aa_p(h.points[-1])) < level_each)


def _aa_p(point: Point) -> float:
    value = point.values.get(Kind.AA)
    return 1.0 if value is None or value.launches < 2 else two_sided_p(value.log, value.error, value.launches - 1)
