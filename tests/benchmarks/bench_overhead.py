"""What Ray costs a measurement: the same ranks under Ray actors and as plain processes, in alternating launches and blocks of one run.

    python -m tests.benchmarks.bench_overhead [--launches 10]

Prints, for a compute-bound and a gather-bound cell, the ratio of trial times with a 95 % interval over pairs of launches, and the time that
dispatching and collecting a block takes beyond the ranks' own, at 4 ranks.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from statistics import fmean, median

from experiments.names import Device, Split
from experiments.spec.arms import ArmSpec
from experiments.spec.cell import Cell
from experiments.spec.dims import PRESETS as DIMS
from experiments.spec.measurement import VerifySpec
from experiments.spec.placement import PlacementSpec
from experiments.spec.simulation import SimulationSpec
from experiments.spec.weights import WeightsSpec
from service.judge.interval import mean_interval
from service.run.cluster import connect
from service.run.local_ranks import local_group
from service.run.orders import block_of
from service.run.rank_group import RankGroup
from service.run.ray_ranks import ray_group
from tests.conftest import make_cell, make_step
from workers.messages import BlockReport, PrepareCell

ARMS = {"baseline": ArmSpec(), "overlapped": ArmSpec(schedule="overlap_rotate")}
PREPARATIONS = 6
"""Of the cell in a launch: where its memory lies decides some per cent of a compute-bound trial, and each preparation draws that anew."""
BLOCKS = 10
"""Of each group in a preparation: short ones, so that what drifts on the machine meets both groups alike."""
FEW_HEADS = DIMS["mini"].model_copy(update={"name": "few_heads", "num_heads": 2})
CELLS = {
    "compute-bound": make_cell(make_step((0, 512)), split=Split.ZIGZAG, dims=DIMS["mini"]),
    "gather-bound": make_cell(make_step((0, 512)), split=Split.ZIGZAG, dims=FEW_HEADS, fabric="emulated_20mbit"),
}


def open_cell(group: RankGroup, cell: Cell, *identity: object) -> None:
    """Prepares the cell, and warms it up."""
    group.ask(PrepareCell(cell, ARMS, WeightsSpec(), 1, 3, VerifySpec(), SimulationSpec()), 60)
    group.ask(block_of(list(ARMS), 6, 1, "warm up", *identity), 120)


def run_block(group: RankGroup, *identity: object) -> tuple[dict[str, float], float]:
    """A short block: each arm's mean log time (slowest rank, us), and the block's wall time beyond the ranks' own, ms."""
    began_ns = time.monotonic_ns()
    answers = group.ask(block_of(list(ARMS), 2, 1, *identity), 120)
    wall_us = (time.monotonic_ns() - began_ns) / 1e3
    reports = [answer for answer in answers if isinstance(answer, BlockReport)]
    logs: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for rows in zip(*(report.rows for report in reports), strict=True):
        logs[rows[0].variant].append(math.log(max(row.elapsed_us for row in rows)))
    return {arm: fmean(logs[arm]) for arm in ARMS}, (wall_us - max(report.busy_us for report in reports)) / 1e3


def pseudomedian(values: Sequence[float]) -> float:
    """The median of all pairwise means (Hodges and Lehmann, Ann. Math. Stat. 34, 1963)."""
    return median((a + b) / 2 for i, a in enumerate(values) for b in values[i:])


def log_ratios(ray_ranks: RankGroup, plain: RankGroup, cell: Cell, launch: int) -> dict[str, float]:
    """One launch of both groups, whose blocks alternate: Ray over plain, for each arm. A preparation counts with the pseudomedian of the
    differences of its neighbouring blocks, a launch with the mean over its preparations. An idle rank only waits."""
    for group in (ray_ranks, plain):
        group.launch(60, 30, Device.CPU, [])
    ratios: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for preparation in range(PREPARATIONS):
        for group in (ray_ranks, plain):
            open_cell(group, cell, launch, preparation)
        differences: dict[str, list[float]] = {arm: [] for arm in ARMS}
        for block in range(BLOCKS):
            order = (ray_ranks, plain) if (block + launch) % 2 == 0 else (plain, ray_ranks)
            logs = {group is ray_ranks: run_block(group, launch, preparation, block)[0] for group in order}
            for arm in ARMS:
                differences[arm].append(logs[True][arm] - logs[False][arm])
        for arm in ARMS:
            ratios[arm].append(pseudomedian(differences[arm]))
    for group in (ray_ranks, plain):
        group.kill_ranks()
    return {arm: fmean(values) for arm, values in ratios.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--launches", type=int, default=10)
    launches = parser.parse_args().launches
    with connect() as cluster:
        print(cluster.words)
        ray_ranks, plain = ray_group(2, PlacementSpec(), 60), local_group(2)
        for name, cell in CELLS.items():
            logs: dict[str, list[float]] = {arm: [] for arm in ARMS}
            for launch in range(launches):
                for arm, value in log_ratios(ray_ranks, plain, cell, launch).items():
                    logs[arm].append(value)
            for arm, values in logs.items():
                ratio = mean_interval(values, 0.95).map_exp()
                print(
                    f"{name:14s} {arm:11s} Ray / plain = {ratio.estimate:.3f} [{ratio.low:.3f}, {ratio.high:.3f}], {launches} pairs of launches"
                )
        ray_ranks.close()
        plain.close()
        four = ray_group(4, PlacementSpec(cpus_per_rank=0.5), 60)
        cell = make_cell(make_step((0, 512)), split=Split.ZIGZAG, cp_size=4)
        extra = []
        for launch in range(5):
            four.launch(60, 30, Device.CPU, [])
            open_cell(four, cell, launch)
            extra.append(median(run_block(four, launch, block)[1] for block in range(3)))
            four.kill_ranks()
        print(
            f"dispatch and collection of a block, 4 ranks: {median(extra):.1f} ms (medians of 5 launches: {min(extra):.1f} to {max(extra):.1f})"
        )
        four.close()


if __name__ == "__main__":
    main()
