"""A picture of a cell's traced trials: for each arm the main and the side lane of every rank, on one time axis."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments.names import BASELINE_ARM, Lane, Part, Regime
from service.judge.results import ArmResult, CellResult
from service.report.timeline import GATHER, crossings
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
    "filler": "#c9c2b6",
    "carry": "#7f6d5f",
    Part.WAIT: "#d4d4d4",
}
WORDS: dict[str, str] = {
    GATHER: "gather: pad, trim, re-range",
    Part.WIRE: "gather: the wire",
    Part.JOIN: "join: main lane waits",
    Part.FORK: "launch point",
}
"""What the legend says where the stage's own name is not enough."""
_WITHIN_GATHER = {Part.PAD, Part.RERANGE}
_EDGES: dict[str, str] = {Part.WIRE: "#b5651d", Part.JOIN: "#888888"}
_DARK = {"wq_b", "logits", "rotate_q"}
_HATCH: dict[str, str] = {Part.WIRE: "////", Part.JOIN: "...."}

BAR = 0.62
"""Height of a bar; lanes of a rank are 1 apart."""
RANK_PITCH = 2.3
_FAINT = "#666666"
_INK = "#222222"
_DASHED = (0, (4, 3))


def draw_lanes(cell: CellResult, reports: Sequence[TraceReport], title: str, path: Path) -> None:
    """Writes a PNG (or what the suffix says); see `lanes_figure`.

    Raises:
        OSError: `path` cannot be written.
    """
    import matplotlib as mpl

    with mpl.rc_context({"hatch.linewidth": 0.6}):
        lanes_figure(cell, reports, title).savefig(path, dpi=130)


def lanes_figure(cell: CellResult, reports: Sequence[TraceReport], title: str) -> Any:
    """The arms side by side. Time starts when the first rank leaves the barrier; every panel has the same axis.

    Args:
        reports: Of every rank, in rank order; each holds the same arms.
        title: What was run and where.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = reports[:MAX_RANKS]
    trials = {arm.arm: [next(t for t in report.arms if t.arm == arm.arm) for report in reports] for arm in cell.arms}
    columns = min(2, len(trials))
    lines = -(-len(trials) // columns)
    figure = Figure(figsize=(10, 1.3 + lines * (0.95 + 0.92 * len(shown))), layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat)
    ends_us = {arm: _end_us(traces) for arm, traces in trials.items()}
    longest_us = max(ends_us.values())
    for axes, arm in zip(panels, cell.arms, strict=False):
        _frame(axes, arm, _timed(cell, arm), ends_us[arm.arm], ends_us[BASELINE_ARM])
        _draw_arm(axes, trials[arm.arm][: len(shown)], 0.2 * longest_us)
    for axes in panels[len(trials) :]:
        axes.set_visible(False)
    panels[0].set_xlim(-0.01 * longest_us, 1.04 * longest_us)
    panels[0].set_ylim(_y(len(shown) - 1, Lane.SIDE) - 0.55, 0.55)
    places = [_y(rank, lane) for rank in range(len(shown)) for lane in Lane]
    panels[0].set_yticks(places, [f"rank {report.rank}  {lane}" for report in shown for lane in Lane])
    more = f"; ranks 0 to {MAX_RANKS - 1} of {len(reports)}" if len(reports) > MAX_RANKS else ""
    figure.suptitle("\n".join(textwrap.fill(line, 130) for line in f"{title}{more}".splitlines()), fontsize=9, x=0.008, ha="left")
    _legend(figure, [trace for traces in trials.values() for trace in traces])
    _label_wide_bars(figure, panels)
    return figure


def _y(rank: int, lane: Lane) -> float:
    return -RANK_PITCH * rank - (1 if lane is Lane.SIDE else 0)


def _origin_ns(traces: Sequence[ArmTrace]) -> int:
    return min(trace.start_ns for trace in traces)


def _end_us(traces: Sequence[ArmTrace]) -> float:
    """When the slowest rank ended."""
    return (max(trace.end_ns for trace in traces) - _origin_ns(traces)) / 1e3


def _timed(cell: CellResult, arm: ArmResult) -> str:
    """What the arm's timed trials took, and of what: a chain is timed by the layer, a replay over all its steps."""
    if arm.latency is None:
        return "no timed trial"
    a_layer = " a layer" if cell.cell["regime"] != Regime.DRAINED else ""
    steps = cell.cell["num_steps"]
    over_all = f" over {steps} steps, of which this is the longest" if steps > 1 else ""
    return f"timed trials: p50 {arm.latency.p50_us:,.0f} us{a_layer}{over_all}"


def _frame(axes: Any, arm: ArmResult, timed: str, end_us: float, baseline_end_us: float) -> None:
    """Everything but the bars."""
    axes.set_title(f"{arm.arm}: {textwrap.shorten(arm.factors['schedule'], 44)}\n{timed}", fontsize=9.5, loc="left")
    axes.axvline(end_us, color=_INK, linewidth=0.9, zorder=2)
    if arm.arm != BASELINE_ARM:
        axes.axvline(baseline_end_us, color=_INK, linewidth=0.9, linestyle=_DASHED, zorder=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.xaxis.set_major_locator(_few_ticks())
    axes.tick_params(axis="x", labelsize=9, labelbottom=True)
    axes.tick_params(axis="y", labelsize=9, length=0)
    axes.set_xlabel("us since the barrier", fontsize=9)
    axes.grid(axis="x", linewidth=0.3, zorder=0)
    axes.set_axisbelow(True)
    for edge in ("top", "right", "left"):
        axes.spines[edge].set_visible(False)


def _few_ticks() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(7)


def _draw_arm(axes: Any, traces: Sequence[ArmTrace], narrow_us: float) -> None:
    """The bars of one arm, of the ranks that are shown. `narrow_us`: a gather as short has no room beside it for two words."""
    origin_ns = _origin_ns(traces)

    def us(time_ns: int) -> float:
        return (time_ns - origin_ns) / 1e3

    for rank, trace in enumerate(traces):
        for span in trace.spans:
            if span.stage in _WITHIN_GATHER:
                continue
            axes.barh(
                _y(rank, span.lane),
                (span.end_ns - span.start_ns) / 1e3,
                left=us(span.start_ns),
                height=BAR,
                color=COLOURS.get(span.stage, "#888888"),
                edgecolor=_EDGES.get(span.stage, "none"),
                linewidth=0.4 if span.stage in _EDGES else 0.0,
                hatch=_HATCH.get(span.stage),
                zorder=4 if span.stage == Part.WIRE else 3,
                label=span.stage,
            )
        if not any(span.lane is Lane.SIDE for span in trace.spans):
            idle = {"xycoords": ("axes fraction", "data"), "ha": "center", "va": "center", "fontsize": 8, "color": _FAINT}
            axes.annotate("side lane idle", (0.5, _y(rank, Lane.SIDE)), **idle)
        _draw_crossings(axes, rank, trace, us, narrow_us)


def _draw_crossings(axes: Any, rank: int, trace: ArmTrace, us: Callable[[int], float], narrow_us: float) -> None:
    """Where a gather leaves the main lane, and where it comes back."""
    top, bottom = _y(rank, Lane.MAIN) - BAR / 2, _y(rank, Lane.SIDE) + BAR / 2
    arrow = {"arrowstyle": "-|>", "color": _INK, "linewidth": 1.1, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 9}
    for number, (fork, gather, join) in enumerate(crossings(trace)):
        launch_us, join_us = us(fork.start_ns), us(join.end_ns)
        axes.annotate("", (us(gather.start_ns), bottom), (launch_us, top), arrowprops=arrow, zorder=6)
        axes.annotate("", (join_us, top), (us(gather.end_ns), bottom), arrowprops=arrow, zorder=6)
        if number:
            continue  # a chain's later layers are like its first, and their words would stand in each other's way
        start_us, end_us = us(gather.start_ns), us(gather.end_ns)
        if end_us - start_us > narrow_us:  # inside the two arrows, else outside
            words = (("launch", start_us, 1), ("join", end_us, -1))
        else:
            words = (("launch", launch_us, -1), ("join", join_us, 1))
        for word, x, sign in words:
            axes.annotate(
                word,
                (x, (top + bottom) / 2),
                (6 * sign, 0),
                textcoords="offset points",
                ha="left" if sign > 0 else "right",
                va="center",
                fontsize=8,
                color=_INK,
                zorder=7,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
            )


def _legend(figure: Any, traces: Sequence[ArmTrace]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    present = {span.stage for trace in traces for span in trace.spans} - _WITHIN_GATHER
    known = [stage for stage in COLOURS if stage in present] + sorted(present - set(COLOURS))
    handles: list[Any] = [
        Patch(
            facecolor=COLOURS.get(stage, "#888888"),
            hatch=_HATCH.get(stage),
            edgecolor=_EDGES.get(stage, "none"),
            label=WORDS.get(stage, stage),
        )
        for stage in known
    ]
    handles.append(Line2D([], [], color=_INK, linewidth=0.9, label="end of the slowest rank"))
    handles.append(Line2D([], [], color=_INK, linewidth=0.9, linestyle=_DASHED, label="that of the baseline"))
    figure.legend(
        handles=handles, loc="outside lower left", ncols=5, fontsize=8.5, frameon=False, handlelength=1.6, columnspacing=1.4
    )


def _label_wide_bars(figure: Any, panels: Sequence[Any]) -> None:
    """Names bars that have room for their name; the legend has the others."""
    figure.canvas.draw()
    for axes in panels:
        for container in axes.containers:
            stage = container.get_label()
            if stage == GATHER:
                continue  # its wire is drawn over it
            for bar in container.patches:
                text = axes.annotate(
                    stage,
                    (bar.get_x() + bar.get_width() / 2, bar.get_y() + bar.get_height() / 2),
                    ha="center",
                    va="center",
                    fontsize=8.5,
                    color="white" if stage in _DARK else _INK,
                    zorder=7,
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.2} if stage in _HATCH else None,
                )
                if text.get_window_extent().width + 10 > bar.get_window_extent().width:
                    text.remove()
