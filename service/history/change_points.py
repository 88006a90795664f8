"""Change points: where the level of a series moved by enough to matter and by more than its nights' own errors explain.

The exact penalised search is the library's (PELT: Killick, Fearnhead and Eckley, J. Am. Stat. Assoc. 107, 2012). Its cost is the
squared distance from a segment's weighted mean in units of each night's variance, so that splitting a segment lowers it by the
squared z of the two levels' difference: the penalty is the squared quantile of the error that one series may make.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import median
from typing import Any

import numpy as np

from service.history.series import Value
from service.judge.interval import t_quantile

ODD_NIGHT = 1e-4
"""A night whose launches scatter as one in ten thousand would by chance is weighed by its own scatter, any other by the usual one:
an estimate from a few launches with heavy tails is worse than that of all nights."""


@dataclass(frozen=True)
class Scatter:
    """How much nights of equal code differ, beyond what their launches tell.

    Attributes:
        inflation: Factor on the variance of every night; at least 1.
        degrees: What its quantiles are read with.
    """

    inflation: float
    degrees: float


@dataclass(frozen=True)
class Step:
    """A level that moved.

    Attributes:
        first: Position of the first night on the new level.
        log: The move, as a logarithm: positive is longer.
        before, after: The levels, logarithms.
        error: Standard error of `log`.
    """

    first: int
    log: float
    before: float
    after: float
    error: float

    @property
    def pct(self) -> float:
        return 100 * math.expm1(self.log)


def scatter_of(group: Sequence[Sequence[Value]], shares_nights: bool) -> Scatter:
    """From the differences of successive nights of several series: a step or a drift touches few of them, and the median forgets those.

    Args:
        shares_nights: A night may move all series together (times), so that its series count as one.
    """
    squares, nights = [], 1
    for values in group:
        variances = launch_variances(values)
        nights = max(nights, len(values))
        pairs = zip(itertools.pairwise(values), itertools.pairwise(variances), strict=True)
        squares += [(new.log - old.log) ** 2 / (u + v) for (old, new), (u, v) in pairs]
    if not squares:
        return Scatter(1.0, 1.0)
    seen = nights - 1 if shares_nights else len(squares)
    found = median(squares) / _MEDIAN_OF_A_SQUARE
    return Scatter(max(1.0, found), float(max(seen, 1)))


_MEDIAN_OF_A_SQUARE = 0.45494
"""Of a standard normal value squared."""


def launch_variances(values: Sequence[Value]) -> list[float]:
    """Each night's variance: the launches' usual one over their number, or its own where that is far larger."""
    launches = [max(value.error, 1e-9) ** 2 * value.launches for value in values]
    degrees = [max(value.launches - 1, 1) for value in values]
    usual = median(v / _median_share(d) for v, d in zip(launches, degrees, strict=True))
    return [
        (v if v > usual * _odd_share(d) else usual) / value.launches
        for v, d, value in zip(launches, degrees, values, strict=True)
    ]


@lru_cache
def _median_share(degrees: int) -> float:
    """The median of an estimated variance over the true one."""
    from scipy.stats import chi2

    return float(chi2.median(degrees)) / degrees


@lru_cache
def _odd_share(degrees: int) -> float:
    from scipy.stats import chi2

    return float(chi2.isf(ODD_NIGHT, degrees)) / degrees


def find_steps(values: Sequence[Value], scatter: Scatter, error: float, minimum_pct: float) -> list[Step]:
    """Every step among these nights, oldest first.

    Args:
        error: The probability with which a series that never moved may be given one, two-sided, where one looks.
        minimum_pct: Smaller steps are not worth a name.
    """
    if len(values) < 2:
        return []
    logs = np.array([value.log for value in values])
    variances = np.array(launch_variances(values)) * scatter.inflation
    quantile = t_quantile(1 - error, scatter.degrees)
    ends = _search(logs, variances, quantile**2)
    return _confirmed(logs, variances, ends, quantile, math.log1p(minimum_pct / 100))


def _search(logs: Any, variances: Any, penalty: float) -> list[int]:
    """The ends of the segments."""
    import ruptures

    search = ruptures.Pelt(custom_cost=_weighted_cost(), min_size=1, jump=1)
    return [int(end) for end in search.fit_predict(np.column_stack((logs, variances)), penalty)]


@lru_cache
def _weighted_class() -> Any:
    from ruptures.base import BaseCost

    class WeightedMean(BaseCost):  # type: ignore[misc]
        """Squared distance from the weighted mean. Signal: a value and its variance a row."""

        model = "weighted_mean"
        min_size = 1

        def fit(self, signal: Any) -> Any:
            self.signal = signal
            weights = 1 / signal[:, 1]
            centred = signal[:, 0] - np.average(signal[:, 0], weights=weights)
            self._w, self._s, self._q = (
                [0.0, *np.cumsum(column).tolist()] for column in (weights, weights * centred, weights * centred**2)
            )
            return self

        def error(self, start: int, end: int) -> float:
            mass, total = self._w[end] - self._w[start], self._s[end] - self._s[start]
            return float(self._q[end] - self._q[start] - total * total / mass)

    return WeightedMean


def _weighted_cost() -> Any:
    return _weighted_class()()


def _confirmed(logs: Any, variances: Any, ends: list[int], quantile: float, minimum: float) -> list[Step]:
    """Steps between segments; the least step that is too small, or not told from nothing, is taken out until none is left."""
    bounds = [0, *ends]
    while True:
        levels = [level(logs, variances, a, b) for a, b in itertools.pairwise(bounds)]
        steps = [
            Step(bounds[i + 1], new[0] - old[0], old[0], new[0], math.sqrt(old[1] + new[1]))
            for i, (old, new) in enumerate(itertools.pairwise(levels))
        ]
        weak = [s for s in steps if abs(s.log) < minimum or abs(s.log) < quantile * s.error]
        if not weak:
            return steps
        bounds.remove(min(weak, key=lambda s: abs(s.log) / s.error).first)


def level(logs: Any, variances: Any, start: int, end: int) -> tuple[float, float]:
    """The weighted mean of some nights, and its variance."""
    weights = 1 / variances[start:end]
    mass = float(weights.sum())
    return float((weights * logs[start:end]).sum()) / mass, 1 / mass
