"""How long it takes to learn of a planted slow-down, from the shell to the answer: `cplab run` beside runs of one version each.

    python -m tests.benchmarks.bench_from_the_shell --folder DIR [--runs 16] [--trials 10] [--min-pct 3] [--set KEY=VALUE]

A study's cell (`cplab calibrate`), 5 % planted. The rival is the one that resolves soonest on recordings of METHODOLOGY's machine A: the
minimum of `--runs` runs of each version in turn, `--trials` each. Its every run is a fresh interpreter, as tools start them; what pytest or asv
themselves take is not counted, and `import torch.distributed` alone, printed below, is the least that any such run takes. The service is asked
as a user asks it, looks after 8, 13 and 20 launches, with A/A, controls and the checks of correctness. Decisions of both take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from service.calibrate.recording import OTHER_ARM
from service.calibrate.rivals import Said, regression
from service.calibrate.study import study_changes

PLANTED = 0.05
OWN_PLAN = ("measurement.aa=true", "measurement.launches=8", "measurement.max_launches=20")


@dataclass(frozen=True)
class Decision:
    """One answer: whether the slow-down was found, and how long it took from the shell."""

    is_found: bool
    wall_s: float


def python(*arguments: str, env: dict[str, str] | None = None) -> tuple[str, float]:
    """What a fresh interpreter prints, and the seconds that it takes."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], env=env, stdout=subprocess.PIPE, text=True, check=False)
    seconds = time.perf_counter() - began
    assert done.returncode in (0, 1), f"{arguments}: exit code {done.returncode}"  # 1: an arm is SLOWER
    return done.stdout, seconds


def one_run(trials: int, wait_us: float, seed: int, changes: list[str]) -> tuple[list[float], float]:
    """The times of a run of one version, us, and the seconds that it took in all."""
    printed, seconds = python(
        *("-m", "tests.benchmarks.one_run", "--trials", str(trials), "--wait-us", str(wait_us), "--seed", str(seed)), *changes
    )
    times_us: list[float] = json.loads(printed)
    return times_us, seconds


def by_the_minimum(options: argparse.Namespace, wait_us: float, seed: int, changes: list[str]) -> Decision:
    """Runs of both versions in turn, and their minima."""
    runs: dict[float, list[list[float]]] = {0.0: [], wait_us: []}
    wall_s = 0.0
    for number in range(options.runs):
        for wait, made in runs.items():
            times_us, seconds = one_run(options.trials, wait, seed + number, changes)
            made.append(times_us)
            wall_s += seconds
    return Decision(regression(min, options.min_pct)(runs[0.0], runs[wait_us]) is Said.SLOWER, wall_s)


def by_the_service(folder: Path, wait_us: float, seed: int, overrides: list[str]) -> Decision:
    """`cplab run` of the same cell, with everything that a user's sweep does."""
    sets = [piece for change in study_changes([*OWN_PLAN, *overrides], seed, wait_us) for piece in ("--set", change)]
    path = folder / f"service-{seed}.json"
    _, wall_s = python(
        *("-m", "service", "run", "quickstart", *sets, "--json", str(path)),
        env={**os.environ, "CPLAB_HOME": str(folder / "home")},
    )
    result = json.loads(path.read_text())
    (arm,) = [arm for cell in result["cells"] for arm in cell["arms"] if arm["arm"] == OTHER_ARM]
    return Decision(arm["verdict"] == "SLOWER", wall_s)


def line(name: str, made: list[Decision]) -> str:
    walls = sorted(decision.wall_s for decision in made)
    return (
        f"| {name} | {sum(decision.is_found for decision in made)} of {len(made)} | "
        f"{median(walls):.1f} ({walls[0]:.1f} to {walls[-1]:.1f}) |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--decisions", type=int, default=5)
    parser.add_argument("--runs", type=int, default=16, help="of each version that the rival takes")
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--min-pct", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE", help="of the study's cell")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    changes = [piece for change in options.overrides for piece in ("--set", change)]

    floor_s = median(python("-c", "import torch.distributed")[1] for _ in range(5))
    pilot = [one_run(50, 0.0, seed, changes) for seed in range(5)]
    wait_us = PLANTED * median(median(times_us) for times_us, _ in pilot)
    rival, own = [], []
    for number in range(options.decisions):
        rival.append(by_the_minimum(options, wait_us, 1000 * (number + 1), changes))
        own.append(by_the_service(options.folder, wait_us, 1000 * (number + 1), options.overrides))
        print(f"{number + 1}/{options.decisions}: {rival[-1].wall_s:.1f} and {own[-1].wall_s:.1f} s", flush=True)
    print("| | 5 % found | s from the shell to the answer |\n|---|---|---|")
    print(line(f"min:{options.min_pct}%, in turn, {options.runs} runs of each, {options.trials} trials", rival))
    print(line("`cplab run`", own))
    ratio = median(d.wall_s for d in rival) / median(d.wall_s for d in own)
    print(
        f"times the service's: {ratio:.1f}; a run takes {median(s for _, s in pilot):.2f} s, `import torch.distributed` alone {floor_s:.2f} s"
    )


if __name__ == "__main__":
    main()
