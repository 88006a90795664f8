"""The page: one self-contained HTML file about a sweep, in the order in which a hostile reviewer reads. It needs no network and no script."""

from __future__ import annotations

import base64
import math
from functools import lru_cache
from pathlib import Path
from typing import Any

from experiments.names import SweepStatus
from service.judge.interval import Interval
from service.judge.results import ArmResult
from service.report.caveats import caveats
from service.report.charts import aa_forest, account_charts, forest, speed_panels
from service.report.dossier import Dossier
from service.report.provenance import (
    command,
    differences,
    findings,
    launch_rows,
    natures,
    placements,
    progress,
    when,
)
from service.report.table import aa_words, bounds, count_cells, counted_verdicts, hardware, percent, verdict_words

FOLDER = Path(__file__).parent


def page(dossier: Dossier) -> str:
    """The page as HTML. Every text is escaped; equal records make equal pages but for the words on where they were read."""
    import yaml

    result, plan = dossier.result, dossier.spec.measurement
    picture = dossier.lanes_png
    return str(
        _template().render(
            d=dossier,
            r=result,
            plan=plan,
            style=(FOLDER / "page.css").read_text(),
            is_running=result.status is SweepStatus.RUNNING,
            progress=progress(dossier),
            hardware=hardware(result),
            aa_words=aa_words(result.aa),
            natures=natures(result),
            findings=findings(result),
            differences=differences(result),
            counts=counted_verdicts(arm for cell in result.cells for arm in cell.arms),
            forest=forest(result, plan.indifference_pct),
            aa_forest=aa_forest(result, plan.confidence, plan.indifference_pct),
            panels=speed_panels(result),
            accounts=account_charts(result),
            lanes=base64.b64encode(picture).decode() if picture else "",
            placements=placements(result),
            launches=launch_rows(dossier),
            caveats=caveats(result),
            command=command(result),
            spec_yaml=yaml.safe_dump(dossier.spec.model_dump(mode="json"), sort_keys=False),
        )
    )


@lru_cache
def _template() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    env = Environment(
        loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    env.filters |= {
        "bounds": bounds,
        "verdict": verdict_words,
        "why": why_unresolved,
        "when": when,
        "percent": percent,
        "count_cells": count_cells,
        "us": lambda value: number(value, 1.0),
        "ms": lambda value: number(value, 1e-3),
        "us_interval": lambda interval: spread(interval, 1.0),
        "pct_interval": lambda interval: spread(interval, 1.0, " %"),
        "share_interval": lambda interval: spread(interval, 100.0, " %") if interval is not None else "",
    }
    return env.get_template("page.html.j2")


def why_unresolved(arm: ArmResult) -> str:
    """What kept a verdict away, and always the effect that would have been seen."""
    if arm.comparison is None:
        return arm.reason
    detectable = f"detectable effect: {number(arm.comparison.detectable_pct)} %"
    return f"{arm.reason}; {detectable}" if arm.comparison.ratio.excludes(1) else detectable


def number(value: float | None, scale: float = 1.0) -> str:
    """Three digits that mean something, thousands with commas; empty for nothing."""
    if value is None:
        return ""
    scaled = value * scale
    if not math.isfinite(scaled):
        return "unbounded"
    size = abs(scaled)
    if size < 0.0005:  # what rounding leaves of nothing
        return "0"
    digits = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3
    return f"{scaled:,.{digits}f}".replace("-", "\N{MINUS SIGN}")


def spread(interval: Interval, scale: float, unit: str = "") -> str:
    """An estimate with its bounds."""
    middle = number(interval.estimate, scale)
    if not (math.isfinite(interval.low) and math.isfinite(interval.high)):
        return f"{middle}{unit} [unbounded]"
    return f"{middle}{unit} [{number(interval.low, scale)}, {number(interval.high, scale)}]"
