"""Samples: trials as recorded, and how they are reduced over ranks and steps."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Trial:
    """One trial of one variant in one step, as every rank saw it; lists are by rank, times in us.

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


@dataclass(frozen=True)
class Sample:
    """One pass of one variant through all steps of the workload: the reduced sample.

    `max_us` sums, over steps, the slowest rank of each: a drained step is not done before its slowest rank is. `min_us` sums the fastest.
    """

    launch: int
    block: int
    kind: str
    row: int
    variant: str
    max_us: float
    min_us: float
    window_us: float
    gather_us: float | None


def reduce_trials(trials: Iterable[Trial]) -> list[Sample]:
    """Samples in the order of launch, block and row."""
    passes: dict[tuple[int, int, str, int, str], list[Trial]] = defaultdict(list)
    for trial in trials:
        passes[(trial.launch, trial.block, trial.kind, trial.row, trial.variant)].append(trial)
    samples = []
    for (launch, block, kind, row, variant), steps in passes.items():
        gathers = [
            max(us for us in step.gather_us if us is not None) for step in steps if any(us is not None for us in step.gather_us)
        ]
        samples.append(
            Sample(
                launch=launch,
                block=block,
                kind=kind,
                row=row,
                variant=variant,
                max_us=math.fsum(max(step.elapsed_us) for step in steps),
                min_us=math.fsum(min(step.elapsed_us) for step in steps),
                window_us=math.fsum(median(step.window_us) for step in steps),
                gather_us=math.fsum(gathers) if gathers else None,
            )
        )
    return samples


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
