"""What breaks, how it is seen, and what is left of the sweep: the table of failures, filled by breaking things. As root (a small disk is mounted).

python tests/benchmarks/bench_failures.py [--only rank_killed,...] [-n 5] [--driver-kills 20] [--out FILE] [--seed 1]

A cluster of three raylets on this machine; every case is injected at a random moment of a sweep of 2 cells, 5 launches and 30 blocks. A case that hit
nothing (the rank was about to be ended anyway) is drawn again. Cut and slowed links need hosts of their own: `bench_links`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.benchmarks.failing_cluster import (
    ROOT,
    SPEC,
    Drive,
    FailingCluster,
    fill,
    is_alive,
    small_disk,
)

BLOCK_S = float(SPEC["measurement"]["block_timeout_s"])  # type: ignore[index]
DEADLINES_S = {
    "rank_killed": 6.0,
    "rank_frozen": BLOCK_S + 10.0,
    "raylet_killed": 30.0,
    "tracker_killed": 0.0,
    "disk_full": 10.0,
    "lease_holder_killed": 5.0,
    "driver_killed": 5.0,
    "head_killed": 45.0,
}
"""From the failure to its name: the attempt is written down, the driver has ended, or the lease is free. A frozen rank shows when its peers' gather
runs out of time, after 5 s here; outside of a collective when its answer does, after 30 s. A head is gone when it has not answered for a while,
and its driver then cleans up what it can."""


@dataclass
class Case:
    """One failure and what came of it."""

    kind: str
    detected_s: float | None = None
    cause: str = ""
    is_right_cause: bool = False
    is_completed: bool = False
    next_block_s: float | None = None
    lost: int = -1
    twice: int = -1
    leaks: tuple[str, ...] = ()
    note: str = ""


class MissedError(Exception):
    """The failure hit nothing; draw again."""


def rank_killed(cluster: FailingCluster, folder: Path, rng: random.Random) -> Case:
    return _rank_hit("rank_killed", signal.SIGKILL, r"rank process {pid} was killed by SIGKILL", cluster, folder, rng)


def rank_frozen(cluster: FailingCluster, folder: Path, rng: random.Random) -> Case:
    return _rank_hit("rank_frozen", signal.SIGSTOP, r"rank process {pid} is stopped", cluster, folder, rng)


def _rank_hit(kind: str, number: int, says: str, cluster: FailingCluster, folder: Path, rng: random.Random) -> Case:
    drive = Drive(cluster, folder)
    if not drive.until_a_random_moment(rng) or not (ranks := [r for r in drive.ranks() if is_alive(r["rank_pid"])]):
        drive.end()
        raise MissedError
    before, hit = drive.complete(), rng.choice(ranks)
    hit_s = time.time()
    os.kill(hit["rank_pid"], number)
    return _measured_anyway(kind, drive, cluster, before, hit_s, says.format(pid=hit["rank_pid"]), f"rank {hit['rank']} ")


def raylet_killed(cluster: FailingCluster, folder: Path, rng: random.Random) -> Case:
    drive = Drive(cluster, folder)
    if not drive.until(lambda: bool(drive.ranks())) or not drive.until_a_random_moment(rng):
        drive.end()
        raise MissedError
    used = {rank["node_id"] for rank in drive.ranks()}
    nodes = [node for node in cluster.workers if node.node_id in used]
    before, node = drive.complete(), rng.choice(nodes)
    hit_s = time.time()
    cluster.kill_raylet(node)
    try:
        return _measured_anyway("raylet_killed", drive, cluster, before, hit_s, r"node|owner|actor|died|unavailable", "")
    finally:
        cluster.add_worker()


def _measured_anyway(kind: str, drive: Drive, cluster: FailingCluster, before: Any, hit_s: float, says: str, begins: str) -> Case:
    """A sweep that goes on by itself."""
    code = drive.end()
    case = Case(kind, is_completed=code == 0 and drive.rows("SELECT status FROM sweep") == [("FINISHED",)])
    if attempts := [a for a in drive.attempts() if a[0] >= hit_s]:
        failed_s, case.cause, _, _ = attempts[0]
        case.detected_s = failed_s - hit_s
        case.is_right_cause = case.cause.startswith(begins) and re.search(says, case.cause) is not None
        case.next_block_s = drive.next_block_s(hit_s, failed_s)
    elif case.is_completed:
        raise MissedError
    case.lost, case.twice = drive.lost_and_twice(before)
    case.leaks = tuple(cluster.leaks(drive.all_ranks()))
    case.note = "" if case.is_completed else drive.said()[-1500:]
    return case


def driver_killed(cluster: FailingCluster, folder: Path, rng: random.Random) -> Case:
    drive = Drive(cluster, folder)
    if not drive.until_a_random_moment(rng):
        drive.end()
        raise MissedError
    hit_s = time.time()
    drive.process.kill()
    drive.process.wait()
    before = drive.complete()
    case = _freed("driver_killed", drive, cluster, hit_s)
    return _resumed(case, cluster, folder, before)


def _freed(kind: str, drive: Drive, cluster: FailingCluster, hit_s: float) -> Case:
    """The lease is free, and the records know that the driver is gone."""
    from service.run.lease import who_holds
    from service.store.claim import claimant

    while (holder := who_holds()) is not None and holder.pid == drive.process.pid and time.time() - hit_s < 60:
        time.sleep(0.05)
    case = Case(kind, detected_s=time.time() - hit_s)
    sweep_id = drive.rows("SELECT sweep_id FROM sweep")[0][0]
    case.is_right_cause = claimant(drive.home / "records.db", sweep_id) is None
    case.cause = "its driver is gone" if case.is_right_cause else "still claimed"
    leaks = cluster.leaks(drive.all_ranks()) if kind == "driver_killed" else []
    case.leaks = tuple(leaks)
    return case


def _resumed(case: Case, cluster: FailingCluster, folder: Path, before: Any) -> Case:
    again = Drive(cluster, folder, "--resume", "last")
    code = again.end()
    case.is_completed = code == 0 and again.rows("SELECT status FROM sweep") == [("FINISHED",)]
    case.lost, case.twice = again.lost_and_twice(before)
    case.leaks += tuple(cluster.leaks(again.all_ranks()))
    case.note = "" if case.is_completed else again.said()[-1500:]
    return case


def lease_holder_killed(cluster: FailingCluster, folder: Path, rng: random.Random) -> Case:
    """A second run waits for the first, which is killed: the second gets the cluster, and the first is resumed after it."""
    first = Drive(cluster, folder)
    if not first.until(lambda: first.rows("SELECT 1 FROM sweep")):
        raise MissedError
    spec = folder.with_suffix(".yaml")
    second = Drive(cluster, folder.with_name(f"{folder.name}-second"), str(spec), "--wait")
    if not second.until(lambda: "waiting: the cluster is taken by" in second.said()) or not first.until_a_random_moment(rng):
        first.end(), second.end()
        raise MissedError
    hit_s = time.time()
    first.process.kill()
    first.process.wait()
    before = first.complete()
    case = _freed("lease_holder_killed", first, cluster, hit_s)
    code = second.end()
    case.is_right_cause = case.is_right_cause and f"pid {first.process.pid}" in second.said()
    case.note = "" if code == 0 else f"the second ended with {code}: {second.said()[-800:]}"
    note = case.note
    case = _resumed(case, cluster, folder, before)
    case.is_completed = case.is_completed and code == 0
    case.note += note
    return case


def head_killed(cluster: FailingCluster, folder: Path, rng: random.Random) -> Case:
    drive = Drive(cluster, folder)
    if not drive.until_a_random_moment(rng):
        drive.end()
        raise MissedError
    hit_s = time.time()
    cluster.kill_head()
    code = drive.end(DEADLINES_S["head_killed"] + 60)
    case = Case("head_killed", detected_s=time.time() - hit_s)
    status = drive.rows("SELECT status, failure FROM sweep")
    case.cause = f"exit {code}, {status}: {drive.said().strip().splitlines()[-1][:200]}"
    case.is_right_cause = code == 4 and "the head of the cluster" in drive.said() and "the head of the cluster" in str(status)
    before = drive.complete()
    # Raylets look for their head for a minute, and end their actors then.
    case.leaks = tuple(cluster.leaks(drive.all_ranks(), 75.0))
    cluster.stop()
    cluster.start()
    return _resumed(case, cluster, folder, before)


def disk_full(cluster: FailingCluster, folder: Path, rng: random.Random) -> Case:
    with small_disk(folder, 24):
        drive = Drive(cluster, folder)
        if not drive.until_a_random_moment(rng):
            drive.end()
            raise MissedError
        hit_s = time.time()
        filler = fill(folder)
        code = drive.end()
        case = Case("disk_full", detected_s=time.time() - hit_s)
        said = drive.said()
        case.cause = said.strip().splitlines()[-1][:300]
        case.is_right_cause = code == 4 and "could not be written" in said and "Traceback" not in said
        before = drive.complete()  # readable, on a disk that is still full
        refused = Drive(cluster, folder)
        code, said = refused.end(), refused.said()
        if code != 2 or ("MiB free" not in said and "cannot be" not in said) or "Traceback" in said:
            case.is_right_cause, case.note = False, f"a run on a full disk ended with {code}: {said[-500:]}"
        filler.unlink()
        note = case.note
        case = _resumed(case, cluster, folder, before)
        case.note += note
        return case


def tracker_killed(cluster: FailingCluster, folder: Path, rng: random.Random) -> Case:
    """At a random moment, half of them while it is published to; back before the driver has ended, or after."""
    with _Tracker(folder.with_name(f"{folder.name}-mlflow")) as tracker:
        drive = Drive(cluster, folder, tracker=tracker.uri)
        if rng.random() < 0.5:
            drive.until_a_random_moment(rng)
        else:
            drive.until(lambda: drive.rows("SELECT 1 FROM sweep WHERE status='FINISHED'"))
            time.sleep(rng.uniform(1.0, 6.0))
        tracker.kill()
        is_back_soon = rng.random() < 0.5
        if is_back_soon:
            tracker.start()
        code = drive.end()
        if not is_back_soon:
            tracker.start()
        case = Case("tracker_killed", detected_s=0.0, is_completed=code == 0)
        said = drive.said()
        case.cause = "published by the run" if "MLflow:" in said else said.strip().splitlines()[-1][:200]
        case.is_right_cause = "MLflow:" in said or (
            "not published, `cplab sync` does it later" in said and "Traceback" not in said
        )
        env = {**os.environ, "CPLAB_HOME": str(folder), "MLFLOW_TRACKING_URI": tracker.uri, "PYTHONPATH": str(ROOT)}
        for _ in range(2):  # a second time publishes nothing twice
            command = [sys.executable, "-m", "service", "sync"]
            done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=120)
            case.is_completed = case.is_completed and done.returncode == 0
            case.note = case.note if done.returncode == 0 else f"sync: {done.stdout}{done.stderr}"[-800:]
        case.lost, case.twice = drive.lost_and_twice({})
        missing, twice = tracker.compare(drive.rows("SELECT cell_id FROM cell"))
        case.lost += missing
        case.twice += twice
        case.leaks = tuple(cluster.leaks(drive.all_ranks()))
        return case


class _Tracker:
    """An MLflow server on SQLite, on loopback."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.folder, self.uri = folder, f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        store = ["--backend-store-uri", f"sqlite:///{self.folder / 'mlflow.db'}"]
        store += ["--artifacts-destination", str(self.folder / "artifacts")]
        with (self.folder / "log").open("a") as log:
            self._server = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "mlflow",
                    "server",
                    *store,
                    "--host",
                    "127.0.0.1",
                    "--port",
                    str(self.port),
                    "--workers",
                    "1",
                ],
                env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        for _ in range(1200):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{self.uri}/health", timeout=1).close()
                return
            time.sleep(0.1)
        raise SystemExit("the tracker did not come up")

    def kill(self) -> None:
        os.killpg(self._server.pid, signal.SIGKILL)
        self._server.wait()

    def __enter__(self) -> _Tracker:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def compare(self, cells: list[tuple[Any, ...]]) -> tuple[int, int]:
        """(runs that are missing, runs that are there twice): one for each cell and arm, and the summary."""
        from mlflow.tracking import MlflowClient

        client = MlflowClient(self.uri)
        experiments = [e.experiment_id for e in client.search_experiments()]
        names = [run.info.run_name for run in client.search_runs(experiments, "tags.sweep_id != ''", max_results=1000)]
        return max(0, 2 * len(cells) + 1 - len(set(names))), len(names) - len(set(names))


KINDS: dict[str, Callable[[FailingCluster, Path, random.Random], Case]] = {
    function.__name__: function
    for function in (
        *(rank_killed, rank_frozen, raylet_killed, disk_full, tracker_killed),
        *(lease_holder_killed, driver_killed, head_killed),
    )
}


def table(cases: list[Case], deadlines_s: Mapping[str, float]) -> Iterator[str]:
    yield "| what | times | in its deadline (median, worst s) | right cause | completed or resumed | lost | twice | leaked | next good block s |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for kind, deadline_s in deadlines_s.items():
        mine = [case for case in cases if case.kind == kind]
        if not mine:
            continue
        n, found = len(mine), [case.detected_s for case in mine if case.detected_s is not None]
        times = f"{statistics.median(found):.1f}, {max(found):.1f}" if found else "-"
        blocks = [case.next_block_s for case in mine if case.next_block_s is not None]
        yield (
            f"| {kind.replace('_', ' ')} | {n} | {sum(t <= deadline_s for t in found)} of {n} in {deadline_s:g} s ({times}) "
            f"| {sum(c.is_right_cause for c in mine)} of {n} | {sum(c.is_completed for c in mine)} of {n} | {sum(c.lost for c in mine)} "
            f"| {sum(c.twice for c in mine)} | {sum(len(c.leaks) for c in mine)} | {f'{statistics.median(blocks):.1f}' if blocks else ''} |"
        )


def _one(kind: str, cluster: FailingCluster, folder: Path, rng: random.Random, number: int) -> Case:
    return KINDS[kind](cluster, folder / f"{kind}-{number}", rng)


def draw(kind: str, wanted: int, one: Callable[[int], Case], cases: list[Case], out: Path | None) -> None:
    """So many cases of a kind, added to `cases` and said, and written to `out` at once; what hit nothing is drawn again."""
    done = tries = 0
    while done < wanted and tries < 3 * wanted + 3:
        tries += 1
        began_s = time.monotonic()
        try:
            case = one(tries)
        except MissedError:
            print(f"{kind}: hit nothing, drawn again", flush=True)
            continue
        except Exception:
            traceback.print_exc()
            case = Case(kind, note=traceback.format_exc())
        done += 1
        cases.append(case)
        print(f"{kind} {done} ({time.monotonic() - began_s:.0f} s): {case}", flush=True)
        if out:
            out.write_text(json.dumps([asdict(c) for c in cases], indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(KINDS), help="kinds, with commas between them")
    parser.add_argument("-n", type=int, default=5, help="cases of each kind")
    parser.add_argument("--driver-kills", type=int, default=None)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="every case as JSON")
    arguments = parser.parse_args()
    rng, cases, cluster = random.Random(arguments.seed), list[Case](), FailingCluster()
    folder = Path(tempfile.mkdtemp(prefix="cplab-failures-"))
    cluster.start()
    try:
        for kind in arguments.only.split(","):
            wanted = arguments.driver_kills if kind == "driver_killed" and arguments.driver_kills else arguments.n
            draw(kind, wanted, partial(_one, kind, cluster, folder, rng), cases, arguments.out)
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)
    print("\n".join(table(cases, DEADLINES_S)))


if __name__ == "__main__":
    main()
