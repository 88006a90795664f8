"""A link that is cut for some seconds, and one that is slowed tenfold, in the middle of a sweep between hosts: seen, named, and measured again?

    python -m tests.benchmarks.bench_links [-n 5] [--out FILE] [--seed 1]

Three hosts (tests/hosts) under `ray up`, a rank on each of two, links of 16 Mbit/s. A link is cut, or slowed, at a random moment, and mended once the
failed attempt is in the records. As root, on a quiet machine.
"""

from __future__ import annotations

import argparse
import random
import secrets
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import yaml

from tests.benchmarks.bench_failures import Case, MissedError, draw, table
from tests.benchmarks.failing_cluster import NOWHERE, SPEC, Drive
from tests.hosts.bench import Bench, Host, bench, missing_bench_piece, wait_for_ssh
from tests.hosts.launcher import TOKEN, fill_in, ray_down, ray_up, wait_for_nodes

RATE_MBPS, SLOW_MBPS = 16.0, 1.6
GATHER_S = 1.0
"""256 KiB a rank take an eighth of a second at the first rate, 1.3 s at the second."""
DEADLINE_S = GATHER_S + 10.0
MEASUREMENT = {"trials_per_block": 2, "control_trials": 2, "gather_timeout_s": GATHER_S}
LINKS = {
    **{**SPEC, "workload": {"kind": "grid", "new_tokens": [2048]}, "placement": {"ranks_per_node": 1}},
    "cells": {"cp_size": 2, "split": ["zigzag", "interleave"], "fabric": "process_group"},
    "measurement": {**SPEC["measurement"], **MEASUREMENT},  # type: ignore[dict-item]
}
SAYS = ("the link between them is cut or slow", "the node, does not answer")


class HostDrive(Drive):
    """See `Drive`: `cplab run` on the head of the bench."""

    def __init__(self, found: Bench, name: str) -> None:
        head = found.head
        self.home = head.folder / "home" / name
        self.home.mkdir()
        (self.home / "spec.yaml").write_text(yaml.safe_dump(LINKS))
        self.log = self.home / f"{secrets.token_hex(2)}.log"
        there = f"{head.home}/{name}"
        env = [*TOKEN, "RAY_ADDRESS=127.0.0.1:6379", f"CPLAB_HOME={there}", f"MLFLOW_TRACKING_URI={NOWHERE}"]
        command = head.command(*env, "python", "-m", "service", "run", f"{there}/spec.yaml", cwd=f"{head.home}/cplab")
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)


def link_cut(found: Bench, host: Host) -> Callable[[], None]:
    found.cut(host)
    return lambda: found.mend(host)


def link_slowed(found: Bench, _host: Host) -> Callable[[], None]:
    found.shape(SLOW_MBPS)
    return lambda: found.shape(RATE_MBPS)


KINDS = {"link_cut": link_cut, "link_slowed": link_slowed}


def case_of(kind: str, found: Bench, rng: random.Random, number: int) -> Case:
    """
    Raises:
        MissedError: The sweep ended first, or felt nothing.
    """
    drive = HostDrive(found, f"{kind}-{number}")
    if not drive.until(lambda: bool(drive.ranks())) or not drive.until_a_random_moment(rng):
        drive.end()
        raise MissedError
    before, used = drive.complete(), {rank["hostname"] for rank in drive.ranks()}
    host = next(host for host in found.workers if host.name in used)
    hit_s = time.time()
    mend = KINDS[kind](found, host)
    try:
        drive.until(lambda: any(failed_s >= hit_s for failed_s, *_ in drive.attempts()), 90)
    finally:
        mend()
    code = drive.end()
    case = Case(kind, is_completed=code == 0 and drive.rows("SELECT status FROM sweep") == [("FINISHED",)])
    attempts = [attempt for attempt in drive.attempts() if attempt[0] >= hit_s]
    if not attempts:
        raise MissedError
    failed_s, case.cause, _, _ = attempts[0]
    case.detected_s = failed_s - hit_s
    case.is_right_cause = any(says in case.cause for says in SAYS)
    case.next_block_s = drive.next_block_s(hit_s, failed_s)
    case.lost, case.twice = drive.lost_and_twice(before)
    case.leaks = tuple(f"rank process {pid}" for pid in _alive(found, drive))
    case.note = "" if case.is_completed else drive.said()[-1500:]
    return case


def _alive(found: Bench, drive: Drive) -> list[int]:
    """Rank processes that outlived their sweep, by the pid that their host gave them."""
    ended, deadline_s = drive.all_ranks(), time.monotonic() + 20.0
    while True:
        left = [pid for host in found.nodes for pid, words in host.processes().items() if pid in ended and "forkserver" in words]
        if not left or time.monotonic() > deadline_s:
            return left
        time.sleep(1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(KINDS), help="kinds, with commas between them")
    parser.add_argument("-n", type=int, default=5, help="cases of each kind")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="every case as JSON")
    arguments = parser.parse_args()
    if piece := missing_bench_piece():
        parser.error(f"needs {piece}")
    rng, cases = random.Random(arguments.seed), list[Case]()
    with bench() as found:
        wait_for_ssh(found)
        fill_in(found)
        ray_up(found)
        wait_for_nodes(found, 3)
        found.shape(RATE_MBPS)
        for kind in arguments.only.split(","):
            draw(kind, arguments.n, partial(case_of, kind, found, rng), cases, arguments.out)
        found.shape(None)
        print("left after `ray down`:", ray_down(found) or "nothing", flush=True)
    print("\n".join(table(cases, dict.fromkeys(KINDS, DEADLINE_S))))


if __name__ == "__main__":
    main()
