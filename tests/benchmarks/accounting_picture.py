"""The picture of `bench_accounting`: times and shares over the link's rate, measured above and simulated below."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from service.judge.interval import Interval

if TYPE_CHECKING:
    from tests.benchmarks.bench_accounting import Point
    from tests.benchmarks.planted_account import SimulatedPoint

BLUE, GREEN, GREY = "#0b5cad", "#1a7f37", "#57606a"
BEYOND = 3.0
"""Where `unshaped` stands: this many times the highest rate."""
MARGIN = 1.3
SHARES_PERCENT = (-25, 175)
"""The frame of the measured shares: an interval that bounds little leaves it, and would hide the others if it did not."""


def draw_accounting(
    points: Sequence[Point],
    simulated: Sequence[SimulatedPoint],
    planted: Mapping[float, Mapping[str, float]],
    machine: str,
    path: Path,
) -> None:
    """Writes a PNG. `planted`: the closed form, by rate in Mbit/s, as dense as the curve should be."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    rates = [p.rate_mbps for p in points if p.rate_mbps is not None]
    places = [p.rate_mbps or BEYOND * max(rates) for p in points]
    figure, ((times, shares), (times_simulated, shares_simulated)) = plt.subplots(2, 2, figsize=(11, 8.5), layout="constrained")

    times.set_title("Real gloo gathers on a link paced by tc tbf (burst 16 KiB)", fontsize=9, loc="left")
    _bars(times, places, [p.serial_us for p in points], GREY, "T(serial)", "s")
    _bars(times, places, [p.account.total_us for p in points], BLUE, "T(overlapped)", "o")
    _line(times, places, [p.account.ideal_us.estimate for p in points], GREEN, "ideal(overlapped)")
    _line(times, places, [p.predicted_us.estimate for p in points], BLUE, "predicted from the controls alone", ":")
    shares.set_title(machine, fontsize=8, loc="left")
    clear = [(place, p.account.hidden) for place, p in zip(places, points, strict=True) if p.account.hidden]
    _bars(shares, [place for place, _ in clear], [_percent(hidden) for _, hidden in clear], BLUE, "hidden", "o")
    ideals = [p.account.hidden_ideal for p in points]
    _line(shares, places, [100 * ideal.estimate if ideal else math.nan for ideal in ideals], GREEN, "ideal: min(W, G) / G")

    times_simulated.set_title("Simulated lanes: found (marks) on what was planted (lines)", fontsize=9, loc="left")
    times_shown = [
        ("total_us", BLUE, "T(overlapped)"),
        ("ideal_us", GREEN, "ideal(overlapped)"),
        ("contention_us", GREY, "contention"),
    ]
    shares_shown = [("hidden", BLUE, "hidden"), ("hidden_ideal", GREEN, "ideal")]
    for axes, scale, shown in ((times_simulated, 1, times_shown), (shares_simulated, 100, shares_shown)):
        for name, colour, label in shown:
            axes.plot(
                list(planted), [scale * figures[name] for figures in planted.values()], color=colour, linewidth=1.3, label=label
            )
            axes.plot(
                [p.rate_mbps for p in simulated], [scale * p.figures[name][0] for p in simulated], "o", color=colour, markersize=5
            )

    for axes, is_link in ((times, True), (shares, True), (times_simulated, False), (shares_simulated, False)):
        ticks = dict(zip(places, [f"{p.rate_mbps:g}" if p.rate_mbps else "unshaped" for p in points], strict=True))
        ticks = ticks if is_link else {p.rate_mbps: f"{p.rate_mbps:g}" for p in simulated}
        axes.set_xscale("log")
        axes.set_xticks(list(ticks), list(ticks.values()))
        axes.minorticks_off()
        axes.set_xlim(min(ticks) / MARGIN, max(ticks) * MARGIN)
        axes.set_xlabel("link rate, Mbit/s in each direction", fontsize=9)
        axes.grid(linewidth=0.3)
        axes.legend(fontsize=8)
        axes.set_ylim(bottom=0)
    shares.set_ylim(SHARES_PERCENT)
    for axes in (times, times_simulated):
        axes.set_ylabel("us per layer", fontsize=9)
    for axes in (shares, shares_simulated):
        axes.set_ylabel("share of the gather hidden, %", fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _bars(axes: Any, places: Sequence[float], intervals: Sequence[Interval], colour: str, label: str, mark: str) -> None:
    estimates = [i.estimate for i in intervals]
    errors = [[i.estimate - i.low for i in intervals], [i.high - i.estimate for i in intervals]]
    axes.errorbar(places, estimates, errors, fmt=mark, color=colour, capsize=3, markersize=5, label=f"{label}, 95 % interval")


def _line(axes: Any, places: Sequence[float], values: Sequence[float], colour: str, label: str, style: str = "-") -> None:
    """A line over the rates; the last place, unshaped, has no rate and stands apart."""
    axes.plot(places[:-1], values[:-1], style, color=colour, linewidth=1.3, label=label)
    axes.plot(places[-1:], values[-1:], "_", color=colour, markersize=14)


def _percent(interval: Interval) -> Interval:
    return Interval(100 * interval.estimate, 100 * interval.low, 100 * interval.high)
