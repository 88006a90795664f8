"""`cplab calibrate fabric`: a link model from gathers as they are here, or as nccl-tests found them.

The model is latency + received bytes / bandwidth, the one that fabrics are held to. Both are fitted to the medians of several sizes with relative
residuals, so that small gathers count as much as large ones, and neither may be negative.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from experiments import catalogue
from experiments.errors import UserError
from experiments.names import BASELINE_ARM, Control, Device
from experiments.spec.arms import ArmSpec
from experiments.spec.cell import Cell
from experiments.spec.experiment import ExperimentSpec
from service.run.orders import block_of, warm_up_of
from service.run.rank_group import RankGroup
from workers.messages import BlockReport, PrepareCell, Prepared, Variant

CELL = (
    "name=calibrate_fabric",
    "dims={name: calibrate, hidden: 128, q_lora_rank: 64, num_heads: 8, topk: 16, num_layers: 1}",
    "cells.fabric=process_group",
    "cells.split=zigzag",
    "cells.scope=qk",
    "verify.delay_ms=2",
)
"""Nothing but its gather matters, whose bytes the tokens decide alone."""
WARM_UP_TRIALS = 5


@dataclass(frozen=True)
class GatherPoint:
    """One size: bytes that arrive at a rank, and the median time of the wire once the last rank is there, us.

    `spread_us` lies between the quarters of its trials; None where a tool says one number.
    """

    received_bytes: int
    wire_us: float
    spread_us: float | None = None


@dataclass(frozen=True)
class LinkModel:
    """`misfit` is the largest departure of a point from the model, as a share of the point."""

    latency_us: float
    bandwidth_mbps: float
    misfit: float


def fit(points: Sequence[GatherPoint]) -> LinkModel:
    """Least squares of relative residuals, both terms at least 0.

    Raises:
        UserError: Fewer than two sizes, or times that do not rise with bytes.
    """
    import numpy as np
    from scipy.optimize import nnls

    if len({point.received_bytes for point in points}) < 2:
        raise UserError(
            f"a link model needs gathers of at least 2 sizes, not {len(points)}: give more --tokens, or a longer FILE"
        )
    times = np.array([point.wire_us for point in points])
    sizes = np.array([float(point.received_bytes) for point in points])
    # In units of their own means, or one column would drown the other.
    (latency, rest), _ = nnls(
        np.column_stack([times.mean() / times, times.mean() * sizes / sizes.mean() / times]), np.ones(len(points))
    )
    latency_us, us_per_byte = float(latency * times.mean()), float(rest * times.mean() / sizes.mean())
    if us_per_byte <= 0:
        raise UserError("these gathers take no longer for more bytes: give larger --tokens")
    misfit = float(np.max(np.abs(latency_us + us_per_byte * sizes - times) / times))
    return LinkModel(latency_us, 8 / us_per_byte, misfit)


def points_of_nccl_tests(path: Path) -> list[GatherPoint]:
    """From the JSON that nccl-tests' all_gather_perf writes (`-J FILE`): the faster of in place and out of place, of each size.

    A size there is the gathered buffer's; all but the rank's own part of it arrives.

    Raises:
        UserError: The file is not that.
    """
    try:
        found = json.loads(path.read_text())
        ranks = len(found["config"]["devices"])
        return [
            GatherPoint(result["size"] * (ranks - 1) // ranks, min(times))
            for result in found["results"]
            if (times := list(_times_us(result))) and result["size"]
        ]
    except OSError as error:
        raise UserError(f"--nccl-tests {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise UserError(
            f"--nccl-tests {path}: not the JSON of nccl-tests' all_gather_perf (-J FILE): {type(error).__name__} {error}"
        ) from None


def _times_us(result: dict[str, Any]) -> Iterable[float]:
    for where in ("in_place", "out_of_place"):
        if result.get(where) and result[where].get("time", 0) > 0:
            yield float(result[where]["time"])


def specs_of(device: Device, cp_size: int, tokens: Sequence[int], skew_us: float) -> ExperimentSpec:
    """What is measured: a cell for each size, and again with the last rank late.

    Raises:
        SpecError: A value that cannot be.
    """
    skews = [0.0, skew_us] if skew_us else [0.0]
    changes = [f"device={device}", f"cells.cp_size={cp_size}", f"workload.new_tokens={list(tokens)}", f"cells.skew_us={skews}"]
    return catalogue.load("quickstart", [*CELL, *changes])


def measure_point(group: RankGroup, spec: ExperimentSpec, cell: Cell, trials: int) -> GatherPoint:
    """The wire of one cell's gathers, run alone: of each trial the rank that waited least, which is the one that came last."""
    plan = spec.measurement
    arms = {BASELINE_ARM: ArmSpec()}
    request = PrepareCell(cell, arms, spec.weights, spec.seed, plan.inputs, spec.verify, spec.simulation)
    prepared = group.ask(request, plan.block_timeout_s)[0]
    assert isinstance(prepared, Prepared)
    variant = Variant(BASELINE_ARM, Control.GATHER_ALONE).key
    group.ask(warm_up_of([variant], WARM_UP_TRIALS, 1, cell.cell_id), plan.block_timeout_s)
    answers = group.ask(block_of([variant], trials, 1, cell.cell_id), plan.block_timeout_s)
    reports = [answer for answer in answers if isinstance(answer, BlockReport)]
    wires_us = sorted(min(row.wire_us or 0.0 for row in rows) for rows in zip(*(report.rows for report in reports), strict=True))
    quarter = len(wires_us) // 4
    return GatherPoint(prepared.received_bytes[0], median(wires_us), wires_us[-1 - quarter] - wires_us[quarter])


def preset(model: LinkModel, link: str, device: Device, ctas: int, words: Sequence[str]) -> str:
    """The fabric as YAML, with `words` above it, to be given as `--set cells.fabric="$(cat FILE)"`."""
    rates = f"bandwidth_mbps: {model.bandwidth_mbps:.6g}, latency_us: {model.latency_us:.4g}"
    comment = "".join(f"# {word}\n" for word in words)
    if device is not Device.CUDA:
        return f"{comment}[{{kind: emulated, {rates}}}]\n"
    played = f"kind: one_rank, link: {link}, mover: cta_writer, ctas: {ctas}, {rates}"
    return f"{comment}[{{{played}, plays: first}}, {{{played}, plays: last}}]\n"
