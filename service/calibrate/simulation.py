"""Coverage by simulation: the service's own rule on trials whose noise and whose true ratio are known.

Each model draws log times of both arms, in the order in which blocks run them. The truth is the ratio of the arms' times in a typical launch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
from numpy.typing import NDArray

from experiments.names import Verdict
from service.calibrate.error_rates import LEVEL, Rate
from service.judge.comparison import SAME_ERROR, Evidence
from service.judge.interval import t_quantile
from service.judge.location import shift
from service.judge.looks import Looks
from service.judge.verdict import judge

Array = NDArray[np.float64]
NoiseModel = Callable[[np.random.Generator, int, int], Array]
"""(generator, launches, trials of both arms in a launch) -> log times [launches, trials] without the effect, arms in turn."""

TRIAL_SD = 0.05
"""Of the log of a trial's time, where a model does not say otherwise. Recorded trials scatter by 0.3 to 0.6; shares and ratios
of widths do not depend on it."""


def white(rng: np.random.Generator, launches: int, trials: int) -> Array:
    """Independent normal trials, launches alike."""
    return rng.normal(0, TRIAL_SD, (launches, trials))


def drift(rng: np.random.Generator, launches: int, trials: int) -> Array:
    """Times that grow or shrink steadily by up to 30 % over the comparison (heat, a filling cache)."""
    total = rng.uniform(-0.3, 0.3)
    return white(rng, launches, trials) + total * np.linspace(0, 1, launches * trials).reshape(launches, trials)


def steps(rng: np.random.Generator, launches: int, trials: int) -> Array:
    """A neighbour that comes and goes: the level jumps by about 20 % once in 60 trials on the average, and stays until the next jump."""
    flat: Array = np.cumsum(np.where(rng.random(launches * trials) < 1 / 60, rng.normal(0, 0.2, launches * trials), 0.0))
    jumping: Array = white(rng, launches, trials) + flat.reshape(launches, trials)
    return jumping


def autocorrelated(rng: np.random.Generator, launches: int, trials: int) -> Array:
    """AR(1) with coefficient 0.9: a trial is much like the one before it."""
    from scipy.signal import lfilter

    shocks = rng.normal(0, TRIAL_SD * math.sqrt(1 - 0.9**2), (launches, trials))
    shocks[:, 0] = rng.normal(0, TRIAL_SD, launches)
    return np.asarray(lfilter([1.0], [1.0, -0.9], shocks, axis=1))


def launch_effects(rng: np.random.Generator, launches: int, trials: int) -> Array:
    """Every launch has a level (5 %), and its own small preference for one arm (1 %): memory layout, ports, which core."""
    level, preference = rng.normal(0, 0.05, (launches, 1)), rng.normal(0, 0.01, (launches, 1))
    return white(rng, launches, trials) + level + np.where(_is_other(trials), preference / 2, -preference / 2)


def heavy_tails(rng: np.random.Generator, launches: int, trials: int) -> Array:
    """One trial in ten is preempted: longer by a Pareto-distributed share (index 1.5: no variance)."""
    spikes = np.where(rng.random((launches, trials)) < 0.1, rng.pareto(1.5, (launches, trials)), 0.0)
    return white(rng, launches, trials) + np.log1p(spikes)


def everything(rng: np.random.Generator, launches: int, trials: int) -> Array:
    """All of the above at once."""
    models = (drift, steps, autocorrelated, launch_effects, heavy_tails)
    total: Array = np.sum([model(rng, launches, trials) for model in models], axis=0)
    return total


MODELS: dict[str, NoiseModel] = {
    model.__name__: model for model in (white, drift, steps, autocorrelated, launch_effects, heavy_tails, everything)
}


@dataclass(frozen=True)
class Coverage:
    """What the rule's intervals did under one model.

    Attributes:
        holds: Intervals, at the rule's own stop, that hold the true ratio.
        width: Median over comparisons of the interval's width over the oracle's. The oracle was told in advance how many launches there would be
            and how much they scatter: 1.96 standard errors, looked at once. No method of launches can be narrower.
        width_t: The same against the t interval of the same launches, had their number been fixed in advance: what the looks cost.
        launches: Median at the stop.
    """

    model: str
    holds: Rate
    width: float
    width_t: float
    launches: float


def coverage(
    name: str, comparisons: int, looks: Looks, effect_pct: float, indifference_pct: float, pairs: int = 40, seed: int = 0
) -> Coverage:
    """`comparisons` of `pairs` pairs a launch under the model of that name, each to its own stop."""
    rng = np.random.default_rng([seed, *name.encode()])
    truth = math.log1p(effect_pct / 100)
    holds, ends = 0, []
    values: list[float] = []
    for _ in range(comparisons):
        logs = [v + truth for v in _launch_values(MODELS[name](rng, looks.last, 2 * pairs))]
        values += logs
        launches, low, high = _stop(logs, looks, indifference_pct)
        holds += low <= truth <= high
        ends.append((launches, high - low))
    spread = float(np.std(values))
    widths = [width / (2 * 1.959964 * spread / math.sqrt(n)) for n, width in ends]
    return Coverage(
        model=name,
        holds=Rate(holds, comparisons),
        width=median(widths),
        width_t=median(t_quantile(1 - LEVEL * looks.share(n), n - 1) / t_quantile(1 - LEVEL, n - 1) for n, _ in ends),
        launches=median(n for n, _ in ends),
    )


def _stop(logs: Sequence[float], looks: Looks, indifference_pct: float) -> tuple[int, float, float]:
    """Launches at the rule's stop, and the interval of the log ratio there."""
    for count in looks.planned:
        evidence = Evidence(tuple(logs[:count]), tuple(logs[:count]), looks.share(count), count)
        comparison = evidence.read(LEVEL, SAME_ERROR)
        if judge(comparison, indifference_pct).verdict is not Verdict.UNRESOLVED:
            break
    return count, math.log(comparison.ratio.low), math.log(comparison.ratio.high)


def _is_other(trials: int) -> NDArray[np.bool_]:
    """Which of a launch's trials are the other arm's: rows A B, B A, A B, ... as a Williams design of two gives."""
    other: NDArray[np.bool_] = np.arange(trials) % 4 % 3 != 0
    return other


def _launch_values(log_times: Array) -> list[float]:
    """What the service makes of each launch."""
    other = _is_other(log_times.shape[1])
    block = np.zeros(np.count_nonzero(other), dtype=int)
    return [shift(launch[~other], launch[other], block) for launch in log_times]
