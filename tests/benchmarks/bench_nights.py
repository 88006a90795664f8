"""Real nights in a row on this machine: does the nightly call a planted regression code, a loaded machine environment, and the rest nothing?

    python -m tests.benchmarks.bench_nights --home DIR [--quick] [--set KEY=VALUE]

Fourteen nights of a short CPU suite (two cells of the loopback, 20 launches, A/A), each a `cplab nightly` of its own with a made-up date: eight
quiet, one with 5 % planted in `overlapped` (a wait on the main lane), a quiet one, one beside processes that load every core half of the time, a
quiet one, one beside processes that load every core all of the time, and a quiet one. A good hour on two cores. Nobody else may compute meanwhile:
look at the `load` column. Nights that are in DIR already are not measured again, so a run that was cut off goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.names import BASELINE_ARM
from service.calibrate.neighbour import MEAN_PAUSE_S, Neighbour
from service.history.suspect import MIN_NIGHTS, Suspect
from service.judge.results import SweepResult
from service.store.home import HOME_ENV_VAR, TRACKING_ENV_VAR
from service.store.judged import load_result
from service.store.records import Records

ROOT = Path(__file__).resolve().parents[2]
SUITE = [
    *("--set", "workload.new_tokens=768", "--set", "cells.fabric=process_group"),
    *("--set", "measurement.trials_per_block=12", "--set", "name=nights_bench"),
]
QUICK = ["--set", "measurement.launches=5"]
ARM = "overlapped"
PLANTED_PCT = 5.0


@dataclass(frozen=True)
class Planned:
    """One night. `called`: who has to be asked about it; None for nobody. `pause_s`: how long the processes that load the cores pause between
    bursts; None where there are none."""

    night: str
    what: str
    called: Suspect | None = None
    pause_s: float | None = None


def plan() -> list[Planned]:
    whats: list[tuple[str, Suspect | None, float | None]] = [("quiet", None, None)] * (MIN_NIGHTS + 1)
    whats += [
        (f"{PLANTED_PCT:g} % in {ARM}", Suspect.CODE, None),
        ("quiet", None, None),
        ("cores loaded half of the time", Suspect.ENVIRONMENT, MEAN_PAUSE_S),
        ("quiet", None, None),
        ("cores loaded", Suspect.ENVIRONMENT, 0.0),
        ("quiet", None, None),
    ]
    return [Planned(f"2026-01-{day:02d}", *rest) for day, rest in enumerate(whats, 1)]


def measure(planned: Planned, home: Path, options: Sequence[str]) -> dict[str, Any]:
    """One night, as its JSON summary."""
    file = home / f"{planned.night}.json"
    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", TRACKING_ENV_VAR)}
    command = [sys.executable, "-m", "service", "nightly", *SUITE, *options, "--night", planned.night, "--json", str(file)]
    with (home / "nights.log").open("a") as log, contextlib.ExitStack() as loaded:
        for seed in range(0 if planned.pause_s is None else os.cpu_count() or 1):
            loaded.enter_context(Neighbour(seed, planned.pause_s or 0.0))
        subprocess.run(command, cwd=ROOT, env=environment | {HOME_ENV_VAR: str(home)}, stdout=log, stderr=log, check=False)
    return dict(json.loads(file.read_text()))


def result_of(home: Path, sweep_id: str) -> SweepResult:
    with contextlib.closing(Records(home / "records.db")) as records:
        return load_result(records, sweep_id)


def wait_us(result: SweepResult) -> float:
    """What is `PLANTED_PCT` of the arm's time, us a layer, in the cell that takes longest."""
    times = [arm.latency.p50_us for cell in result.cells for arm in cell.arms if arm.arm == ARM and arm.latency is not None]
    return max(times) * PLANTED_PCT / 100


def suspects_of(summary: dict[str, Any]) -> list[str]:
    """Of everything that began on this very night."""
    return [str(f["suspect"]) for f in summary["findings"] if f["first_bad"]["night"] == summary["night"]]


def is_right(planned: Planned, summary: dict[str, Any]) -> bool:
    """Whether it says what was planted: a regression of code that began, an environment that moved and no code, or nothing that began."""
    said = set(suspects_of(summary))
    if planned.called is Suspect.CODE:
        return summary["status"] == "REGRESSION" and said == {Suspect.CODE}
    if planned.called is Suspect.ENVIRONMENT:
        return said == {Suspect.ENVIRONMENT}
    return not said


def line(planned: Planned, summary: dict[str, Any], result: SweepResult, took_s: float) -> str:
    ratios = [
        f"{arm.comparison.ratio.estimate:.3f}"
        for cell in result.cells
        for arm in cell.arms
        if arm.arm != BASELINE_ARM and arm.comparison is not None
    ]
    times = [
        f"{arm.latency.p50_us / 1000:.1f}" for c in result.cells for arm in c.arms if arm.arm == BASELINE_ARM and arm.latency
    ]
    said = ", ".join(suspects_of(summary)) or "nobody"
    load = result.environment.get("load_1min")
    right = "yes" if is_right(planned, summary) else "NO"
    columns = [
        planned.night,
        planned.what,
        " ".join(ratios),
        " ".join(times),
        str(load),
        summary["status"],
        said,
        right,
        f"{took_s:.0f}",
    ]
    return f"| {' | '.join(columns)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, required=True, help="a CPLAB_HOME of its own")
    parser.add_argument("--quick", action="store_true", help="5 launches a night: for a trial of this script; too few for 5 %%")
    parser.add_argument("--nights", type=int, default=len(plan()), help="only the first so many")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="as of `cplab nightly`; device=simulated: a dry run"
    )
    options = parser.parse_args()
    options.home.mkdir(parents=True, exist_ok=True)
    home, began = options.home.absolute(), time.monotonic()
    base = [*(QUICK if options.quick else []), *(word for pair in options.set for word in ("--set", pair))]
    print(
        "| night | planted | ratios of the cells | baseline, ms | load before | status | suspects of what began | as planted | s |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    right, wait = 0, 0.0
    chosen = plan()[: options.nights]
    for planned in chosen:
        more = ["--set", f"arms.{ARM}.planted_wait_us={wait:.1f}"] if planned.called is Suspect.CODE else []
        since = time.monotonic()
        summary = measure(planned, home, [*base, *more])
        if summary["sweep_id"] is None:
            raise SystemExit(f"{planned.night}: {summary['title']}: see {home / 'nights.log'}")
        result = result_of(home, summary["sweep_id"])
        if planned.called is None:
            wait = wait_us(result)
        right += is_right(planned, summary)
        print(line(planned, summary, result, time.monotonic() - since), flush=True)
    print(
        f"\n{right} of {len(chosen)} nights as planted; {(time.monotonic() - began) / 60:.0f} minutes; the summaries are in {home / 'nights'}"
    )


if __name__ == "__main__":
    main()
