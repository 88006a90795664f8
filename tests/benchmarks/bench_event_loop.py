"""What gloo's event loop costs a rank that has one core, when a message that wakes it may preempt a sender (`workers.event_loop`).

    python -m tests.benchmarks.bench_event_loop [--launches 10] [--set KEY=VALUE]

Equal arms of a calibration study's cell, in launches that take turns: with the loop under SCHED_BATCH, as ranks set it, and under SCHED_OTHER, as the
system would have it. Linux lets this process change the policy of its ranks' threads.
"""

from __future__ import annotations

import argparse
import os

import numpy as np

from experiments.names import BASELINE_ARM
from experiments.spec.experiment import ExperimentSpec
from service.calibrate.live import times_of
from service.calibrate.recording import OTHER_ARM
from service.calibrate.study import study_spec
from service.run.local_ranks import local_group
from service.run.rank_group import RankGroup

POLICIES = {"gives way (SCHED_BATCH)": os.SCHED_BATCH, "preempts (SCHED_OTHER)": os.SCHED_OTHER}
SPIKE = 1.8
"""A trial that took that many medians was held up."""


def set_policy(group: RankGroup, policy: int) -> None:
    """Of the event loops of all ranks: those threads that ranks put under SCHED_BATCH."""
    for joined in group.joined:
        threads = [int(thread) for thread in os.listdir(f"/proc/{joined.pid}/task")]
        loops = [thread for thread in threads if os.sched_getscheduler(thread) == os.SCHED_BATCH]
        assert loops, "a rank's event loop gives way"
        for thread in loops:
            os.sched_setscheduler(thread, policy, os.sched_param(0))


def pairs_of_a_launch(group: RankGroup, spec: ExperimentSpec, policy: int, number: int) -> np.ndarray:
    """Times of the slowest rank, us, [pairs, 2]: baseline and other of each row."""
    group.launch(spec.measurement.launch_timeout_s, spec.measurement.gather_timeout_s, spec.device, [])
    set_policy(group, policy)
    times_us = times_of(group, spec, [BASELINE_ARM, OTHER_ARM], number)
    return np.array([times_us[BASELINE_ARM], times_us[OTHER_ARM]]).T


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--launches", type=int, default=10, help="of each policy")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE", help="of the study's cell")
    options = parser.parse_args()
    spec = study_spec(options.overrides, 1, 0.0)
    found: dict[str, list[np.ndarray]] = {name: [] for name in POLICIES}
    group = local_group(spec.cells.cp_size[0])
    try:
        for number in range(options.launches):
            for name, policy in POLICIES.items():
                found[name].append(pairs_of_a_launch(group, spec, policy, number))
                group.kill_ranks()
    finally:
        group.close()
    print("| event loop | median us | trials held up | pairs scatter by | medians of launches by |\n|---|---|---|---|---|")
    for name, launches in found.items():
        medians = [float(np.median(pairs)) for pairs in launches]
        held = np.mean([np.mean(pairs > SPIKE * median) for pairs, median in zip(launches, medians, strict=True)])
        scatter = np.median([np.std(np.log(pairs[:, 1] / pairs[:, 0])) for pairs in launches])
        print(f"| {name} | {np.median(medians):,.0f} | {held:.1%} | {scatter:.1%} | {np.std(np.log(medians)):.1%} |")


if __name__ == "__main__":
    main()
