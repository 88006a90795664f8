"""The page's charts as numbers: places in per cent and words. The template draws them; nothing of an INVALID cell is in any."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.names import BASELINE_ARM, Verdict
from service.judge.accounting import AccountSummary
from service.judge.interval import Interval
from service.judge.results import ArmResult, CellResult, SweepResult
from service.report.axis import Axis, linear_axis, points_axis, ratio_axis
from service.report.table import percent, verdict_words

LANE_COLOURS = ("#3b5b92", "#c2571a", "#2f7d5b", "#8a4f9e", "#8c6d1f", "#5f6b76", "#a3324e", "#2a7f8f")
"""One an arm, in the order of the spec."""

_DASHES = ("", "7 4", "2 3", "10 3 2 3")


@dataclass(frozen=True)
class Whisker:
    """An estimate with its interval on an axis; an end that lies off it is an arrow."""

    middle_pct: float
    low_pct: float
    high_pct: float
    is_low_off: bool
    is_high_off: bool


def whisker(interval: Interval, axis: Axis) -> Whisker:
    return Whisker(
        axis.place_pct(interval.estimate),
        axis.place_pct(interval.low),
        axis.place_pct(interval.high),
        interval.low < axis.low,
        interval.high > axis.high,
    )


@dataclass(frozen=True)
class ForestRow:
    cell: CellResult
    name: str
    verdict: Verdict | None
    words: str
    """The verdict, and how large the effect is."""
    ratio: Interval
    whisker: Whisker


@dataclass(frozen=True)
class Forest:
    """Ratios with their intervals on one axis, and the indifference band."""

    axis: Axis
    band_pct: tuple[float, float] | None
    one_pct: float
    rows: tuple[ForestRow, ...]
    left_out: tuple[str, ...]
    """Comparisons without an interval: INVALID, or too little measured."""


def forest(result: SweepResult, indifference_pct: float) -> Forest | None:
    """Every comparison of the sweep; None without any."""
    pairs = [(cell, arm) for cell in result.cells for arm in cell.arms if arm.arm != BASELINE_ARM]
    drawn = [
        (c, a.arm, a.verdict, verdict_words(a), a.comparison.ratio)
        for c, a in pairs
        if a.comparison is not None and not c.is_invalid
    ]
    missing = [f"{a.arm} {c.label} ({a.verdict})" for c, a in pairs if a.comparison is None or c.is_invalid]
    label = f"time ratio to baseline (1 = as fast, below 1 = faster), {percent(result.confidence)} % interval"
    return _forest(drawn, label, indifference_pct, missing)


def aa_forest(result: SweepResult, confidence: float, indifference_pct: float) -> Forest | None:
    """Every cell's A/A pair, each read by itself."""
    drawn = [(c, "A/A", None, "", c.aa.ratio) for c in result.cells if c.aa is not None and not c.is_invalid]
    label = f"time ratio of the baseline to itself (1 = as fast), {percent(confidence)} % interval"
    return _forest(drawn, label, indifference_pct, [c.label for c in result.cells if c.aa is None or c.is_invalid])


def _forest(
    rows: Sequence[tuple[CellResult, str, Verdict | None, str, Interval]],
    label: str,
    indifference_pct: float,
    missing: Iterable[str],
) -> Forest | None:
    if not rows:
        return None
    estimates = [ratio.estimate for *_, ratio in rows]
    # A few wide intervals must not squeeze all others into a dot: they go off the axis as arrows.
    low = max(min(ratio.low for *_, ratio in rows), 0.7 * min(estimates))
    high = min(max(ratio.high for *_, ratio in rows), 1.4 * max(estimates))
    band_share = indifference_pct / 100
    axis = ratio_axis(min(low, 1 - band_share), max(high, 1 + band_share), label)
    band = (axis.place_pct(1 - band_share), axis.place_pct(1 + band_share)) if band_share else None
    drawn = tuple(ForestRow(*row, whisker(row[-1], axis)) for row in rows)
    return Forest(axis, band, axis.place_pct(1), drawn, tuple(missing))


@dataclass(frozen=True)
class AccountBar:
    """One arm's time: compute, then what of the gather is exposed; the mark is `ideal`."""

    arm: ArmResult
    account: AccountSummary
    compute_pct: float
    total_pct: float
    ideal_pct: float
    total: Whisker

    @property
    def exposed_pct(self) -> float:
        return max(0.0, round(self.total_pct - self.compute_pct, 3))


@dataclass(frozen=True)
class AccountChart:
    """The arms of one cell on one axis from 0."""

    cell: CellResult
    axis: Axis
    bars: tuple[AccountBar, ...]


def account_charts(result: SweepResult) -> list[AccountChart]:
    """A chart for every cell that has accounts."""
    charts = []
    for cell in result.cells:
        accounts = [(arm, arm.account) for arm in cell.arms if arm.account is not None]
        if not accounts or cell.is_invalid:
            continue
        longest = max(max(a.total_us.estimate, a.ideal_us.estimate) for _, a in accounts)
        reach = max((a.total_us.high for _, a in accounts if a.total_us.high <= 1.3 * longest), default=longest)
        axis = linear_axis(0.0, max(longest, reach), "time of one pass, us per layer", 4)
        bars = tuple(
            AccountBar(
                arm,
                a,
                compute_pct=axis.place_pct(min(a.compute_us.estimate, a.total_us.estimate)),
                total_pct=axis.place_pct(a.total_us.estimate),
                ideal_pct=axis.place_pct(a.ideal_us.estimate),
                total=whisker(a.total_us, axis),
            )
            for arm, a in accounts
        )
        charts.append(AccountChart(cell, axis, bars))
    return charts


@dataclass(frozen=True)
class Point:
    x_pct: float
    y_pct: float
    """From the top."""
    words: str


@dataclass(frozen=True)
class Series:
    name: str
    colour: str
    dashes: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class SpeedPanel:
    """tokens/s over one coordinate, all others but the arm and the series' own being equal."""

    title: str
    x: Axis
    y: Axis
    series: tuple[Series, ...]


_NOT_COORDINATES = {
    "cell_id",
    "label",
    "workload",
    "new_tokens",
    "cp_size",
    "steps_without_cp",
    "beyond_upstream",
    "fabric",
    "dims",
}


def speed_panels(result: SweepResult) -> list[SpeedPanel]:
    """Panels by length when there are several, else by cp_size; none when a sweep has one of each."""
    cells = [cell for cell in result.cells if not cell.is_invalid and any(arm.tokens_per_s for arm in cell.arms)]
    lengths, sizes = ({cell.cell[name] for cell in cells} for name in ("new_tokens", "cp_size"))
    if len(lengths) > 1:
        x_name, series_name, x_label = "new_tokens", "cp_size", "new tokens of a step, tokens"
    elif len(sizes) > 1:
        x_name, series_name, x_label = "cp_size", "new_tokens", "cp_size, ranks"
    else:
        return []
    groups: dict[str, list[CellResult]] = defaultdict(list)
    coordinates = {cell.label: _coordinates(cell.cell) for cell in cells}
    for cell in cells:
        groups[json.dumps(coordinates[cell.label], sort_keys=True, default=str)].append(cell)
    varied = [key for key in coordinates[cells[0].label] if len({str(c.get(key)) for c in coordinates.values()}) > 1]
    top = max(arm.tokens_per_s or 0.0 for cell in cells for arm in cell.arms)
    x = points_axis([cell.cell[x_name] for cell in cells], x_label)
    y = linear_axis(0.0, top, "indexer speed, tokens/s", 5)
    panels = []
    for members in groups.values():
        about = coordinates[members[0].label]
        panels.append(
            SpeedPanel(
                ", ".join(_words(key, about[key]) for key in varied), x, y, tuple(_series(members, x_name, series_name, x, y))
            )
        )
    return panels


def _words(name: str, value: Any) -> str:
    """A coordinate in a title: words speak for themselves, numbers need their name, which has the unit."""
    return value if isinstance(value, str) else f"{name} {value:,g}" if isinstance(value, float) else f"{name} {value}"


def _coordinates(cell: dict[str, Any]) -> dict[str, Any]:
    """What a panel holds fixed, whatever coordinates a cell has."""
    return {key: value for key, value in cell.items() if key not in _NOT_COORDINATES}


def _series(cells: Sequence[CellResult], x_name: str, series_name: str, x: Axis, y: Axis) -> Iterable[Series]:
    arms = [arm.arm for arm in cells[0].arms]
    values = sorted({cell.cell[series_name] for cell in cells})
    for place, value in enumerate(values):
        for position, name in enumerate(arms):
            points = []
            for cell in sorted(cells, key=lambda c: c.cell[x_name]):
                speed = next((arm.tokens_per_s for arm in cell.arms if arm.arm == name), None)
                if cell.cell[series_name] == value and speed is not None and math.isfinite(speed):
                    at = x.place_pct(cell.cell[x_name]), round(100 - y.place_pct(speed), 3)
                    points.append(Point(*at, f"{name}, {cell.label}: {speed:,.0f} tokens/s"))
            if points:
                more = f", {series_name.replace('_', ' ')} {value:,}" if len(values) > 1 else ""
                colour = LANE_COLOURS[position % len(LANE_COLOURS)]
                yield Series(f"{name}{more}", colour, _DASHES[place % len(_DASHES)], tuple(points))
