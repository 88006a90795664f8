"""What Ray costs a measurement: the same ranks under Ray actors and as plain processes, in alternating launches of one run.

    python -m tests.benchmarks.bench_overhead [--launches 10]

Prints, for a compute-bound and a gather-bound cell, the ratio of trial times with a 95 % interval over pairs of launches, and the time that
dispatching and collecting a block takes beyond the ranks' own, at 4 ranks.
"""

from __future__ import annotations

import argparse
import math
import time
from statistics import median

from experiments.names import Device, Split
from experiments.spec.arms import ArmSpec
from experiments.spec.cell import Cell
from experiments.spec.dims import PRESETS as DIMS
from experiments.spec.measurement import PlacementSpec, VerifySpec
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
FEW_HEADS = DIMS["mini"].model_copy(update={"name": "few_heads", "num_heads": 2})
CELLS = {
    "compute-bound": make_cell(make_step((0, 512)), split=Split.ZIGZAG, dims=DIMS["mini"]),
    "gather-bound": make_cell(make_step((0, 512)), split=Split.ZIGZAG, dims=FEW_HEADS, fabric="emulated_20mbit"),
}


def measure(group: RankGroup, cell: Cell, launch: int) -> tuple[dict[str, float], float]:
    """One launch: the median trial of each arm (slowest rank), us; and the wall time of a block beyond the ranks' own, ms."""
    group.launch(60, 30, Device.CPU, [])
    group.ask(PrepareCell(cell, ARMS, WeightsSpec(), launch, 3, VerifySpec(), SimulationSpec()), 60)
    group.ask(block_of(list(ARMS), 4, 1, "warm up", launch), 120)
    times: dict[str, list[float]] = {arm: [] for arm in ARMS}
    extra_ms = []
    for block in range(3):
        began_ns = time.monotonic_ns()
        answers = group.ask(block_of(list(ARMS), 8, 1, launch, block), 120)
        wall_us = (time.monotonic_ns() - began_ns) / 1e3
        reports = [answer for answer in answers if isinstance(answer, BlockReport)]
        extra_ms.append((wall_us - max(report.busy_us for report in reports)) / 1e3)
        for rows in zip(*(report.rows for report in reports), strict=True):
            times[rows[0].variant].append(max(row.elapsed_us for row in rows))
    group.kill_ranks()
    return {arm: median(values) for arm, values in times.items()}, median(extra_ms)


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
                order = (ray_ranks, plain) if launch % 2 == 0 else (plain, ray_ranks)
                found = {group is ray_ranks: measure(group, cell, launch)[0] for group in order}
                for arm in ARMS:
                    logs[arm].append(math.log(found[True][arm] / found[False][arm]))
            for arm, values in logs.items():
                ratio = mean_interval(values, 0.95).map_exp()
                print(
                    f"{name:14s} {arm:11s} Ray / plain = {ratio.estimate:.3f} [{ratio.low:.3f}, {ratio.high:.3f}], {launches} pairs of launches"
                )
        ray_ranks.close()
        plain.close()
        four = ray_group(4, PlacementSpec(cpus_per_rank=0.5), 60)
        cell = make_cell(make_step((0, 512)), split=Split.ZIGZAG, cp_size=4)
        extra = [measure(four, cell, launch)[1] for launch in range(5)]
        print(
            f"dispatch and collection of a block, 4 ranks: {median(extra):.1f} ms (medians of 5 launches: {min(extra):.1f} to {max(extra):.1f})"
        )
        four.close()


if __name__ == "__main__":
    main()
