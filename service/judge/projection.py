"""Projection: what a saving per layer is of a whole layer and of the time to first token. Pure arithmetic; the layer's time is the user's.

The saving is the baseline's median time x (1 - time_ratio), with the ratio's own interval: corrected for the other comparisons and for the looks,
so a projection cannot say more than the verdict does. (`saved_us` of the account is read at its own, uncorrected level, and against `serial`.)
The baseline's time and the user's figures are taken as known.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from experiments.errors import UserError
from experiments.names import BASELINE_ARM, Verdict
from service.judge.interval import Interval
from service.judge.results import SweepResult

SMALL_PCT = 1.0
"""Per cent of a layer below which effects like SGLang PR #20438's end."""


@dataclass(frozen=True)
class Layer:
    """What the user knows of the whole layer, for the same new tokens and cp_size as the cell's.

    Attributes:
        layer_us: Time of one whole layer.
        source: Where that figure is from, with hardware and date; shown beside every projection.
        layers_in_model: How many layers save alike; needed for TTFT.
        ttft_ms: Time to first token of a prompt that is one pass of the cell's workload.
    """

    layer_us: float
    source: str
    layers_in_model: int | None = None
    ttft_ms: float | None = None

    def __post_init__(self) -> None:
        """
        Raises:
            UserError: A figure without a source, no figure at all, or half of what TTFT needs.
        """
        for key, value in (
            ("--layer-us", self.layer_us),
            ("--ttft-ms", self.ttft_ms),
            ("--layers-in-model", self.layers_in_model),
        ):
            if value is not None and not (math.isfinite(value) and value > 0):
                raise UserError(f"{key}: {value!r} is no time or number above 0")
        if not self.source.strip():
            raise UserError(
                '--layer-source: say where the layer\'s time is from, as in --layer-source "profile of ..., H200, 2026-11"'
            )
        if self.ttft_ms is not None and self.layers_in_model is None:
            raise UserError(
                "--layers-in-model: a share of --ttft-ms needs the number of layers that save alike, as in --layers-in-model 61"
            )


def layer_given(layer_us: float | None, source: str, layers_in_model: int | None, ttft_ms: float | None) -> Layer | None:
    """The layer that a user's options describe; None when there are none.

    Raises:
        UserError: Options that lack the layer's time, or see `Layer`.
    """
    if layer_us is None:
        if source or layers_in_model is not None or ttft_ms is not None:
            raise UserError("--layer-us: a projection needs the time of a whole layer, in us")
        return None
    return Layer(layer_us, source, layers_in_model, ttft_ms)


@dataclass(frozen=True)
class Projection:
    """One arm's saving, carried on with its interval; per cent and times below 0 are losses.

    Attributes:
        saved_us: Per layer.
        layer_pct: Of the layer's time.
        model_ms: Over all layers; None when their number was not given.
        ttft_pct: Of the time to first token; None when it was not given.
    """

    saved_us: Interval
    layer_pct: Interval
    model_ms: Interval | None
    ttft_pct: Interval | None

    @property
    def is_small(self) -> bool:
        """Whether even the interval's far end lies under 1 % of a layer."""
        return self.layer_pct.inside(-SMALL_PCT, SMALL_PCT)

    @property
    def words(self) -> str:
        """What it comes to, in one sentence."""
        reach = max(abs(self.layer_pct.low), abs(self.layer_pct.high))
        if self.is_small:
            return f"under {SMALL_PCT:g} % of a layer (at most {reach:.2g} %)"
        if math.isinf(reach):
            return "not bounded by what was measured"
        return f"up to {reach:.2g} % of a layer"


@dataclass(frozen=True)
class ProjectedArm:
    """A projection with what it is about."""

    cell_id: str
    label: str
    arm: str
    is_told: bool
    """Whether the verdict is FASTER or SLOWER; else the saving is not told from none."""
    projection: Projection


def project_sweep(result: SweepResult, layer: Layer, cell_id: str | None = None) -> list[ProjectedArm]:
    """The projections of every compared arm in the cells whose work is that of the layer.

    Args:
        cell_id: A cell whose workload and cp_size the layer's time is for; needed where a sweep has several.

    Raises:
        UserError: There is no such cell, or it has to be said which one.
    """
    works = {str(cell.cell["cell_id"]): (cell.cell["workload"], cell.cell["cp_size"]) for cell in result.cells}
    if cell_id is None and len(set(works.values())) > 1:
        firsts = {work: name for name, work in reversed(works.items())}
        known = ", ".join(f"{name} ({workload}, cp_size {size})" for (workload, size), name in reversed(firsts.items()))
        raise UserError(
            f"--layer-cell: a layer's time is for one workload and cp_size, the sweep has {len(firsts)}: say which: {known}"
        )
    if cell_id is not None and cell_id not in works:
        raise UserError(f"--layer-cell: no cell {cell_id!r} in sweep {result.sweep_id}; it has: {', '.join(works)}")
    meant = works[cell_id] if cell_id is not None else next(iter(works.values()), None)
    projected = []
    for cell in result.cells:
        baseline = next((arm.latency for arm in cell.arms if arm.arm == BASELINE_ARM), None)
        if works[str(cell.cell["cell_id"])] != meant or cell.is_invalid or baseline is None:
            continue
        projected += [
            ProjectedArm(
                cell_id=str(cell.cell["cell_id"]),
                label=cell.label,
                arm=arm.arm,
                is_told=arm.verdict in (Verdict.FASTER, Verdict.SLOWER),
                projection=project(arm.comparison.ratio, baseline.p50_us, layer),
            )
            for arm in cell.arms
            if arm.comparison is not None
        ]
    return projected


def project(ratio: Interval, baseline_us: float, layer: Layer) -> Projection:
    """The projection of an arm.

    Args:
        ratio: time_ratio (arm / baseline).
        baseline_us: The baseline's p50 in the same cell, us per layer.
    """

    def scaled(interval: Interval, factor: float) -> Interval:
        return Interval(*(value * factor for value in (interval.estimate, interval.low, interval.high)))

    saved_us = scaled(Interval(1 - ratio.estimate, 1 - ratio.high, 1 - ratio.low), baseline_us)
    model_ms = scaled(saved_us, layer.layers_in_model / 1e3) if layer.layers_in_model else None
    return Projection(
        saved_us=saved_us,
        layer_pct=scaled(saved_us, 100 / layer.layer_us),
        model_ms=model_ms,
        ttft_pct=scaled(model_ms, 100 / layer.ttft_ms) if model_ms and layer.ttft_ms else None,
    )
