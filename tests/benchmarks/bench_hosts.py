"""`overlap_vs_baseline` (reduced) on three hosts of one machine, submitted from a fourth, over links of several rates.

    python -m tests.benchmarks.bench_hosts --launches 10 20 none

Shows what overlap wins on a slow link, and what is claimed where there is next to nothing to win. As root, on a quiet machine.
"""

from __future__ import annotations

import argparse
import time

from service.judge.results import SweepResult
from service.report.table import verdict_words
from tests.hosts.bench import Bench, bench, missing_bench_piece, wait_for_ssh
from tests.hosts.launcher import fill_in, ray_down, ray_up, submit, tunnel, wait_for_nodes
from tests.hosts.reduced import last_result, words_of


def run(found: Bench, settings: list[str], timeout_s: float) -> SweepResult:
    """One submitted sweep.

    Raises:
        RuntimeError: The job failed; with what it said.
    """
    with tunnel(found):
        done = submit(found, "run", "overlap_vs_baseline", *words_of(settings), timeout_s=timeout_s)
    if done.returncode:
        raise RuntimeError(done.stdout[-4000:] + done.stderr[-2000:])
    return last_result(found)


def line(rate: str, result: SweepResult, took_s: float) -> str:
    cell = result.cells[0]
    baseline, arm = cell.arms[0], cell.arms[1]
    assert arm.comparison is not None and arm.account is not None
    ratio, account = arm.comparison.ratio, arm.account
    shown = [
        f"{name} {found.estimate:.2f} ({found.low:.2f} to {found.high:.2f})" if found else f"{name} -"
        for name, found in (("ratio", ratio), ("hidden", account.hidden), ("ideal", account.hidden_ideal))
    ]
    gather_ms = f"G {account.gather_us.estimate / 1e3:.1f} ms" if account.gather_us else "G -"
    hosts = " ".join(rank["hostname"] for rank in result.environment["launches"][0]["ranks"])
    verdict = verdict_words(arm)
    head = f"{rate:>5} Mbit/s  ranks on {hosts}  {verdict:<12}"
    return f"{head} {'  '.join(shown)}  {gather_ms}  p50 {baseline.latency.p50_us / 1e3:.1f} ms  {took_s:.0f} s"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--launches", type=int, default=6)
    parser.add_argument("rates", nargs="+", help="Mbit/s of every host's link, each way; `none` for as fast as the machine can")
    arguments = parser.parse_args()
    if piece := missing_bench_piece():
        parser.error(f"needs {piece}")
    with bench() as found:
        wait_for_ssh(found)
        fill_in(found)
        ray_up(found)
        wait_for_nodes(found, 3)
        for rate in arguments.rates:
            found.shape(None if rate == "none" else float(rate))
            began_s = time.monotonic()
            result = run(found, ["placement.ranks_per_node=1", f"measurement.launches={arguments.launches}"], 1200)
            print(line(rate, result, time.monotonic() - began_s), flush=True)
        found.shape(None)
        print("left after `ray down`:", ray_down(found) or "nothing", flush=True)


if __name__ == "__main__":
    main()
