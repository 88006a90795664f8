"""What the table's columns say of a run, as texts: MLflow shows a tag as it is, and a number without its interval is half a result."""

from __future__ import annotations

import re
from collections.abc import Mapping

from service.judge.results import ArmResult, CellResult, SweepResult
from service.store.palette import arm_color

COLOR_TAG = "mlflow.runColor"
"""MLflow's own: what a run's bars, lines and dots are drawn in."""

PLACE_TAG = "place"
"""What the prepared views sort by: the summary, then the cells in the order of the grid, each with its arms, then curves and histories."""

SERIES_TAG, NIGHTS_SERIES, EARLIER_SERIES = "series", "nights", "earlier nights"
"""What the summaries of nights and their histories share: one view shows both, and MLflow's filters know no `or`."""

STATUS_TAG = "status"
"""How a night ended."""

SHORT_REVISION = 7
_GRID = re.compile(r"^new(\d+)-cp(\d+)-")


def arm_columns(result: SweepResult, cell: CellResult, arm: ArmResult) -> dict[str, str]:
    """The tags of one arm's run. An INVALID cell shows no speed here either."""
    position = result.cells.index(cell)
    order = [found.arm for found in cell.arms].index(arm.arm)
    shown = {} if cell.is_invalid else _figures(cell, arm)
    return {
        PLACE_TAG: f"1.{position:04d}.{order:02d}",
        COLOR_TAG: arm_color(order),
        "shape": shape(cell.label),
        **({"aa": text} if (text := aa_text(result, cell)) else {}),
        **shown,
    }


def _figures(cell: CellResult, arm: ArmResult) -> dict[str, str]:
    texts = {"tok_s": short_number(arm.tokens_per_s) if arm.tokens_per_s else ""}
    if arm.comparison is not None:
        ratio = arm.comparison.ratio
        texts["ratio"] = ratio_text(ratio.estimate, ratio.low, ratio.high)
        if arm.account is not None and arm.account.hidden is not None:
            texts["hidden"] = f"{100 * arm.account.hidden.estimate:.0f} %"
    return {name: text for name, text in texts.items() if text}


def summary_columns(result: SweepResult) -> dict[str, str]:
    """The tags of the summary: from the least to the greatest of what its cells say."""
    compared = [
        arm.comparison.ratio.estimate for cell in result.cells if not cell.is_invalid for arm in cell.arms if arm.comparison
    ]
    aa = result.aa
    return {
        PLACE_TAG: "0",
        COLOR_TAG: "#1f2328",
        "shape": f"{len(result.cells)} cells",
        **({"ratio": f"{min(compared):.3f} to {max(compared):.3f}"} if compared else {}),
        **({"aa": f"{len(aa.flagged)} flagged" if aa.flagged else "quiet"} if aa.cells else {"aa": "not run"}),
    }


def ratio_text(estimate: float, low: float, high: float) -> str:
    """A ratio with its interval, short enough for a column."""
    return f"{estimate:.3f} [{low:.3f},{high:.3f}]"


def aa_text(result: SweepResult, cell: CellResult) -> str:
    """The ratio of equal code, and a mark where it looked different."""
    if cell.aa is None or cell.is_invalid:
        return ""
    return f"{cell.aa.ratio.estimate:.3f}{'!' if cell.label in result.aa.flagged else ''}"


def shape(label: str) -> str:
    """A cell's label as a column has room for it: new tokens x ranks, then the rest."""
    return _GRID.sub(r"\1x\2 ", label).replace("-", " ")


def short_number(value: float) -> str:
    """Three digits and a prefix, as in 207k."""
    for unit, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.3g}{prefix}"
    return f"{value:.3g}"


def short_revision(environment: Mapping[str, object]) -> str:
    """A commit's first characters, with a plus where there was more than the commit; the source's digest where there is no commit."""
    revision = str(environment.get("revision", "unknown"))[:SHORT_REVISION]
    return f"{revision}+" if environment.get("dirty") else revision
