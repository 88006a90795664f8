"""An axis: where a value lies between two ends, in per cent, so that a chart fits any width; and where its ticks are."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

LOG_FROM = 3.0
"""A ratio of the ends from which equal factors are shown as equal steps."""


@dataclass(frozen=True)
class Tick:
    place_pct: float
    text: str


@dataclass(frozen=True)
class Axis:
    """From `low` to `high`; `label` ends with the unit."""

    low: float
    high: float
    label: str
    ticks: tuple[Tick, ...]
    is_log: bool = False

    def place_pct(self, value: float) -> float:
        """0 at the low end, 100 at the high end, never beyond."""
        low, high = self.low, self.high
        if self.is_log:
            low, high, value = math.log(low), math.log(high), math.log(max(value, 1e-300))
        return round(100 * min(1.0, max(0.0, (value - low) / (high - low))), 3)


def linear_axis(low: float, high: float, label: str, num_ticks: int = 6) -> Axis:
    """Ends at round values that enclose `low` and `high`."""
    from matplotlib.ticker import MaxNLocator

    if high <= low:
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
    values = [float(v) for v in MaxNLocator(nbins=num_ticks, steps=[1, 2, 5, 10]).tick_values(low, high)]
    return _axis(values[0], values[-1], label, values, False)


def log_axis(low: float, high: float, label: str) -> Axis:
    """Ticks at 1, 2 and 5 times powers of ten; `low` is above 0."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    values = [m * 10.0**e for e in range(first, last + 1) for m in (1, 2, 5) if low <= m * 10.0**e <= high]
    return _axis(low, high, label, values, True)


def ratio_axis(low: float, high: float, label: str) -> Axis:
    """For ratios: 1 is always on it."""
    low, high = min(low, 1.0), max(high, 1.0)
    return log_axis(low, high, label) if low > 0 and high / low >= LOG_FROM else linear_axis(low, high, label)


def points_axis(values: Sequence[float], label: str) -> Axis:
    """Ticks at the values themselves, which are few and chosen (lengths, sizes): equal factors are equal steps."""
    ends = min(values), max(values)
    if ends[0] == ends[1]:
        ends = ends[0] / 2, ends[1] * 2
    margin = (ends[1] / ends[0]) ** 0.04
    return _axis(ends[0] / margin, ends[1] * margin, label, sorted(set(values)), True)


def _axis(low: float, high: float, label: str, values: Sequence[float], is_log: bool) -> Axis:
    bare = Axis(low, high, label, (), is_log)
    step = min((b - a for a, b in itertools.pairwise(values)), default=1.0)
    digits = max(0, -math.floor(math.log10(step) + 1e-9)) if not is_log else 0
    return Axis(low, high, label, tuple(Tick(bare.place_pct(v), _text(v, digits, is_log)) for v in values), is_log)


def _text(value: float, digits: int, is_log: bool) -> str:
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value:g}" if is_log and value < 1 else f"{value:,.{digits}f}"
