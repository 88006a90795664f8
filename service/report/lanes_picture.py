"""A picture of a cell's traced trials: for each arm the main and the side lane of every rank, on one time axis."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.names import BASELINE_ARM, Lane, Part
from service.judge.results import ArmResult, CellResult
from service.report.timeline import GATHER, launches
from workers.messages import ArmTrace, TraceReport

MAX_RANKS = 4
"""More would be too small to read; the trace file has all."""

COLOURS: dict[str, str] = {
    "wq_b": "#4c78a8",
    "wk": "#9ecae9",
    "norm_k": "#e45756",
    "rope": "#72b7b2",
    "rotate_q": "#54a24b",
    "rotate_k": "#b6d77a",
    Part.FORK: "#222222",
    GATHER: "#e8760a",
    Part.WIRE: "#fde3c2",
    Part.JOIN: "#eeeeee",
    "quantise": "#b279a2",
    "head_gates": "#e3bcd8",
    "logits": "#9d755d",
}
WORDS: dict[str, str] = {
    GATHER: "gather: pad, trim, re-range",
    Part.WIRE: "gather: the wire",
    Part.JOIN: "join: main lane waits",
    Part.FORK: "launch point",
}
"""What the legend says where the stage's own name is not enough."""
_WITHIN_GATHER = {Part.PAD, Part.RERANGE}
_HATCH: dict[str, str] = {Part.WIRE: "////", Part.JOIN: "...."}

BAR = 0.62
"""Height of a bar; lanes of a rank are 1 apart."""
RANK_PITCH = 2.45


def draw_lanes(cell: CellResult, reports: Sequence[TraceReport], title: str, path: Path) -> None:
    """Writes a PNG (or what the suffix says), arms side by side. Time starts when the first rank leaves the barrier.

    Args:
        reports: Of every rank, in rank order; each holds the same arms.
        title: What was run and where.

    Raises:
        OSError: `path` cannot be written.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    shown = reports[:MAX_RANKS]
    arms = [trace.arm for trace in reports[0].arms]
    columns = min(2, len(arms))
    lines = -(-len(arms) // columns)
    figure, grid = plt.subplots(
        lines,
        columns,
        figsize=(10, 1.75 + lines * (0.75 + 0.98 * len(shown))),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    panels = list(grid.flat)
    results = {arm.arm: arm for arm in cell.arms}
    ends_us = {}
    for axes, arm in zip(panels, arms, strict=False):
        traces = [next(trace for trace in report.arms if trace.arm == arm) for report in reports]
        ends_us[arm] = _draw_arm(axes, traces, len(shown))
        axes.set_title(_heading(results[arm]), fontsize=9.5, loc="left")
    longest_us = max(ends_us.values())
    for axes, arm in zip(panels, arms, strict=False):
        _finish(axes, ends_us[arm], ends_us.get(BASELINE_ARM) if arm != BASELINE_ARM else None)
        axes.set_xlim(-0.01 * longest_us, 1.03 * longest_us)
    for axes in panels[len(arms) :]:
        axes.set_visible(False)
    places = [y for rank in range(len(shown)) for y in (_y(rank, Lane.MAIN), _y(rank, Lane.SIDE))]
    names = [f"rank {report.rank}  {lane}" for report in shown for lane in Lane]
    panels[0].set_yticks(places, names, fontsize=9)
    panels[0].set_ylim(_y(len(shown) - 1, Lane.SIDE) - 0.62, 0.85)
    _legend(figure, [trace for report in reports for trace in report.arms])
    more = f"; ranks 0 to {MAX_RANKS - 1} of {len(reports)}" if len(reports) > MAX_RANKS else ""
    figure.suptitle(f"{title}{more}", fontsize=9, x=0.008, ha="left")
    _label_wide_bars(figure, panels)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _y(rank: int, lane: Lane) -> float:
    return -RANK_PITCH * rank - (1 if lane is Lane.SIDE else 0)


def _heading(arm: ArmResult) -> str:
    timed = f"; timed apart: p50 {arm.latency.p50_us:,.0f} us" if arm.latency else ""
    return f"{arm.arm} ({arm.factors['schedule']}){timed}"


def _draw_arm(axes: Any, traces: Sequence[ArmTrace], num_ranks: int) -> float:
    """The bars of one arm; when its slowest rank ended, us."""
    origin_ns = min(trace.start_ns for trace in traces)

    def us(time_ns: int) -> float:
        return (time_ns - origin_ns) / 1e3

    for rank, trace in enumerate(traces[:num_ranks]):
        for span in trace.spans:
            if span.stage in _WITHIN_GATHER:
                continue
            axes.barh(
                _y(rank, span.lane),
                (span.end_ns - span.start_ns) / 1e3,
                left=us(span.start_ns),
                height=BAR,
                color=COLOURS.get(span.stage, "#888888"),
                edgecolor="#a05a10" if span.stage == Part.WIRE else "#777777" if span.stage == Part.JOIN else "none",
                linewidth=0.0 if span.stage not in _HATCH else 0.4,
                hatch=_HATCH.get(span.stage),
                zorder=4 if span.stage == Part.WIRE else 3,
                label=span.stage,
            )
        if not any(span.lane is Lane.SIDE for span in trace.spans):
            axes.annotate(
                "side lane idle",
                (0.5, _y(rank, Lane.SIDE)),
                xycoords=("axes fraction", "data"),
                ha="center",
                va="center",
                **_FAINT,
            )
        _draw_crossings(axes, rank, trace, us)
    return max(us(trace.end_ns) for trace in traces)


_FAINT: dict[str, Any] = {"fontsize": 8, "color": "#777777"}


def _draw_crossings(axes: Any, rank: int, trace: ArmTrace, us: Any) -> None:
    """Where a gather leaves the main lane, and where it comes back."""
    top, bottom = _y(rank, Lane.MAIN) - BAR / 2, _y(rank, Lane.SIDE) + BAR / 2
    middle = (top + bottom) / 2
    arrow = {"arrowstyle": "-|>", "color": "#222222", "linewidth": 1.1, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 9}
    joins = [span for span in trace.spans if span.stage == Part.JOIN]
    for (fork, gather), join in zip(launches(trace), joins, strict=True):
        axes.annotate("", (us(gather.start_ns), bottom), (us(fork.start_ns), top), arrowprops=arrow, zorder=6)
        axes.annotate("", (us(join.end_ns), top), (us(gather.end_ns), bottom), arrowprops=arrow, zorder=6)
        side = {"textcoords": "offset points", "va": "center", "fontsize": 8}
        axes.annotate("launch", (us(fork.start_ns), middle), (5, 0), ha="left", **side)
        axes.annotate("join", (us(gather.end_ns), middle), (-5, 0), ha="right", **side)


def _finish(axes: Any, end_us: float, baseline_end_us: float | None) -> None:
    axes.axvline(end_us, color="#222222", linewidth=0.9, zorder=2)
    if baseline_end_us is not None:
        axes.axvline(baseline_end_us, color="#222222", linewidth=0.9, linestyle=(0, (4, 3)), zorder=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.tick_params(axis="x", labelsize=9, labelbottom=True)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("us since the barrier", fontsize=9)
    axes.grid(axis="x", linewidth=0.3, zorder=0)
    axes.set_axisbelow(True)
    for edge in ("top", "right", "left"):
        axes.spines[edge].set_visible(False)


def _legend(figure: Any, traces: Sequence[ArmTrace]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    present = {span.stage for trace in traces for span in trace.spans} - _WITHIN_GATHER - {Part.FORK}
    known = [stage for stage in COLOURS if stage in present] + sorted(present - set(COLOURS))
    handles: list[Any] = [
        Patch(
            facecolor=COLOURS.get(stage, "#888888"),
            hatch=_HATCH.get(stage),
            edgecolor="#777777" if stage in _HATCH else "none",
            label=WORDS.get(stage, stage),
        )
        for stage in known
    ]
    handles.append(Line2D([], [], color="#222222", linewidth=0.9, label="slowest rank's end"))
    handles.append(Line2D([], [], color="#222222", linewidth=0.9, linestyle=(0, (4, 3)), label="the baseline's"))
    figure.legend(
        handles=handles, loc="outside lower left", ncols=6, fontsize=8.5, frameon=False, handlelength=1.6, columnspacing=1.4
    )


def _label_wide_bars(figure: Any, panels: Sequence[Any]) -> None:
    """Names bars that have room for their name; the legend has the others."""
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    for axes in panels:
        for container in axes.containers:
            stage = container.get_label()
            if stage == GATHER:
                continue  # its wire is drawn over it
            for bar in container.patches:
                box = bar.get_window_extent()
                text = axes.annotate(
                    stage,
                    (bar.get_x() + bar.get_width() / 2, bar.get_y() + bar.get_height() / 2),
                    ha="center",
                    va="center",
                    fontsize=8.5,
                    color="white" if stage in ("wq_b", "logits", "rotate_q") else "#222222",
                    zorder=7,
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.2} if stage in _HATCH else None,
                )
                if text.get_window_extent(renderer).width + 10 > box.width:
                    text.remove()
