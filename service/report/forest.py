"""A picture of a sweep's ratios: one line a comparison, its interval, and 1 where nothing is gained."""

from __future__ import annotations

from pathlib import Path

from service.judge.results import SweepResult
from service.report.table import hardware, percent, verdict_words

COLOURS = {"FASTER": "#1a7f37", "SLOWER": "#b42318", "SAME": "#57606a", "UNRESOLVED": "#9a6700", "INVALID": "#b42318"}


def draw_forest(result: SweepResult, path: Path) -> None:
    """Writes a PNG (or what the suffix says). INVALID cells are named and have no mark.

    Raises:
        OSError: `path` cannot be written.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    lines = [(cell, arm) for cell in result.cells for arm in cell.arms if arm.verdict is not None]
    figure, axes = plt.subplots(figsize=(9, 1.4 + 0.45 * len(lines)), layout="constrained")
    for place, (cell, arm) in enumerate(reversed(lines)):
        colour = COLOURS[arm.verdict] if arm.verdict else "black"
        label = "INVALID"
        if arm.comparison and not cell.faults:
            ratio = arm.comparison.ratio
            axes.plot([ratio.low, ratio.high], [place, place], color=colour, linewidth=2.5, solid_capstyle="butt")
            axes.plot([ratio.estimate], [place], "o", color=colour, markersize=7)
            label = f"{verdict_words(arm)}  {ratio.estimate:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"
        axes.annotate(label, (1.01, place), xycoords=("axes fraction", "data"), va="center", color=colour, fontsize=9)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(lines)), [f"{arm.arm}  {cell.label}" for cell, arm in reversed(lines)], fontsize=9)
    axes.set_ylim(-0.7, len(lines) - 0.3)
    axes.set_xlabel(
        f"time ratio to baseline (below 1 is faster), {percent(result.confidence)} % interval over launches", fontsize=9
    )
    axes.set_title(f"{result.experiment} {result.sweep_id}\n{hardware(result)}", fontsize=8, loc="left")
    axes.grid(axis="x", linewidth=0.3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
