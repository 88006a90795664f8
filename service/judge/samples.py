"""Samples: trials as recorded, and how they are reduced over ranks and steps."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from experiments.names import Control, Regime
from workers.messages import Variant


@dataclass(frozen=True)
class Trial:
    """One trial of one variant in one step, as every rank saw it; lists are by rank, times in us; of a chain they are means over its layers.

    Attributes:
        launch, block: Where it was measured; `kind` is `arms` or `controls`.
        row: The row of the block's design; every variant has one trial in each row and step.
        variant: `arm`, or `arm/control`.
    """

    launch: int
    block: int
    kind: str
    row: int
    step: int
    variant: str
    elapsed_us: tuple[float, ...]
    window_us: tuple[float, ...]
    gather_us: tuple[float | None, ...]
    wire_us: tuple[float | None, ...]
    late_us: tuple[float | None, ...]
    skew_us: float | None
    """Spread of the ranks' arrivals at the gather; None where none ran or clocks are not shared."""
    lateness_us: tuple[float | None, ...] = ()
    """How much later than the first one each rank arrived; None as `skew_us` is."""
    filler_us: tuple[float | None, ...] = ()
    """What the filler after a layer took; None where there is none."""
    enqueue_us: tuple[float | None, ...] = ()
    """Host time to enqueue the trial; None where the host does the work itself."""


@dataclass(frozen=True)
class Sample:
    """One pass of one variant through all steps of the workload: the reduced sample. In a chain every time is one of its layers', on the mean.

    Attributes:
        time_us: What is published and compared: `max_us` when drained; in a chain the median over ranks, or `max_us` where no gather
            couples them.
        max_us, min_us: The slowest rank of each step, summed over steps: a drained step is not done before its slowest rank is; the fastest.
        rank_us: Each rank's own time, summed over steps.
        enqueue_share: Host time to enqueue over elapsed time, the largest of any rank and step; None where the host does the work.
    """

    launch: int
    block: int
    kind: str
    row: int
    variant: str
    time_us: float
    max_us: float
    min_us: float
    rank_us: tuple[float, ...]
    window_us: float
    gather_us: float | None
    enqueue_share: float | None


def is_coupled(variant: str, regime: Regime) -> bool:
    """Whether a gather makes the ranks of a chain keep step, so that each one's period is the group's."""
    return regime is Regime.STREAMING and Variant.parse(variant).control not in (Control.PREFILLED, Control.ZERO_BYTE)


def reduce_trials(trials: Iterable[Trial], regime: Regime = Regime.DRAINED) -> list[Sample]:
    """Samples in the order of launch, block and row."""
    passes: dict[tuple[int, int, str, int, str], list[Trial]] = defaultdict(list)
    for trial in trials:
        passes[(trial.launch, trial.block, trial.kind, trial.row, trial.variant)].append(trial)
    samples = []
    for (launch, block, kind, row, variant), steps in passes.items():
        gathers = [
            max(us for us in step.gather_us if us is not None) for step in steps if any(us is not None for us in step.gather_us)
        ]
        over_ranks = median if is_coupled(variant, regime) else max
        samples.append(
            Sample(
                launch=launch,
                block=block,
                kind=kind,
                row=row,
                variant=variant,
                time_us=math.fsum(over_ranks(step.elapsed_us) for step in steps),
                max_us=math.fsum(max(step.elapsed_us) for step in steps),
                min_us=math.fsum(min(step.elapsed_us) for step in steps),
                rank_us=tuple(math.fsum(times) for times in zip(*(step.elapsed_us for step in steps), strict=True)),
                window_us=math.fsum(median(step.window_us) for step in steps),
                gather_us=math.fsum(gathers) if gathers else None,
                enqueue_share=max((share for step in steps for share in _enqueue_shares(step)), default=None),
            )
        )
    return samples


def _enqueue_shares(trial: Trial) -> list[float]:
    times = zip(trial.enqueue_us, trial.elapsed_us, strict=False)
    return [enqueue_us / elapsed_us for enqueue_us, elapsed_us in times if enqueue_us is not None]


def launch_time_us(passes: Sequence[Sample], regime: Regime) -> float:
    """One launch's time of a variant. Drained: the median of its samples. In a chain: each rank's median period, then the median over
    ranks, or the largest where no gather couples them.

    Raises:
        StatisticsError: No passes.
    """
    if regime is Regime.DRAINED:
        return median(sample.time_us for sample in passes)
    over_ranks = median if is_coupled(passes[0].variant, regime) else max
    return float(over_ranks(median(times) for times in zip(*(sample.rank_us for sample in passes), strict=True)))


def by_launch(samples: Iterable[Sample]) -> dict[int, list[Sample]]:
    """Samples of each launch, launches in order."""
    grouped: dict[int, list[Sample]] = defaultdict(list)
    for sample in samples:
        grouped[sample.launch].append(sample)
    return dict(sorted(grouped.items()))


def percentile(values: Sequence[float], share: float) -> float:
    """Linear interpolation between order statistics.

    Raises:
        ValueError: No values.
    """
    if not values:
        raise ValueError("a percentile needs values")
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)
