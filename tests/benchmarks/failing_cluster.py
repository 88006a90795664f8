"""What the bench of failures breaks: a Ray cluster of three raylets on this machine, drivers on it, and what their records hold afterwards."""

from __future__ import annotations

import contextlib
import json
import os
import random
import secrets
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).resolve().parents[2]
LEAK_S = 20.0
"""Ray's own clean-up after a driver that died takes some seconds."""
SPEC = {
    "name": "failures",
    "dims": {"name": "tiny", "hidden": 64, "q_lora_rank": 32, "num_heads": 4, "topk": 8, "num_layers": 1},
    "workload": {"kind": "grid", "new_tokens": [64, 128]},
    "cells": {"cp_size": 2, "split": "zigzag", "fabric": "process_group"},
    "arms": {"baseline": {"schedule": "serial"}, "overlapped": {"schedule": "overlap_rotate"}},
    "verify": {"rows_per_rank": 1, "delay_ms": 0},
    "placement": {"strategy": "SPREAD"},
    "measurement": {
        **{"launches": 5, "blocks": 2, "trials_per_block": 4, "control_trials": 2, "warmup_trials": 1, "aa": False, "inputs": 2},
        **{"gather_timeout_s": 5, "block_timeout_s": 30, "launch_timeout_s": 60, "max_warmup_blocks": 1},
    },
}
BLOCKS_A_VISIT = 3
NUM_BLOCKS = 2 * 5 * BLOCKS_A_VISIT
NOWHERE = "http://127.0.0.1:9"
"""A tracker that is down: what is not about tracking need not wait for it."""


class FailingCluster:
    """A head and two workers with a CPU each, so that one of them can go."""

    def __init__(self) -> None:
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
        os.environ.pop("RAY_ADDRESS", None)
        self._cluster: Any = None
        self.workers: list[Any] = []

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def start(self) -> None:
        import ray
        from ray.cluster_utils import Cluster

        small = {"num_cpus": 1, "object_store_memory": 80_000_000}
        self._cluster = Cluster(initialize_head=True, head_node_args={**small, "include_dashboard": False})
        self.workers = [self._cluster.add_node(**small) for _ in range(2)]
        ray.init(address=self.address, log_to_driver=False, logging_level="ERROR")

    def add_worker(self) -> None:
        small = {"num_cpus": 1, "object_store_memory": 80_000_000}
        self.workers.append(self._cluster.add_node(**small))

    def kill_raylet(self, node: Any) -> None:
        """As a node that dies: no word to anyone."""
        (info,) = node.all_processes["raylet"]
        os.kill(info.process.pid, signal.SIGKILL)
        self.workers.remove(node)
        self._cluster.worker_nodes.discard(node)
        info.process.wait()
        node.kill_all_processes(check_alive=False, allow_graceful=False)

    def kill_head(self) -> None:
        """The control store and the head's raylet, at once."""
        import ray

        ray.shutdown()  # this process is no part of what fails
        head = self._cluster.head_node
        for kind in ("gcs_server", "raylet"):
            for info in head.all_processes.get(kind, []):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(info.process.pid, signal.SIGKILL)
                info.process.wait()

    def stop(self) -> None:
        import ray

        ray.shutdown()
        for node in (*self._cluster.worker_nodes, self._cluster.head_node):
            with contextlib.suppress(Exception):
                node.kill_all_processes(check_alive=False, allow_graceful=False)
        with contextlib.suppress(Exception):
            self._cluster.shutdown()

    def leaks(self, ranks: list[int], limit_s: float = LEAK_S) -> list[str]:
        """What is still there of runs that have ended, after Ray had the time to see it."""
        deadline_s = time.monotonic() + limit_s
        while (found := self._alive(ranks)) and time.monotonic() < deadline_s:
            time.sleep(0.5)
        return found

    def _alive(self, ranks: list[int]) -> list[str]:
        import ray
        from ray._private.state import state

        found = [f"rank process {pid}" for pid in ranks if is_alive(pid)]
        if ray.is_initialized():
            found += [
                f"actor {a['ActorClassName']} {a['State']}" for a in state.actor_table(None).values() if a["State"] != "DEAD"
            ]
            groups = ray.util.placement_group_table().values()
            found += [f"placement group {g['state']}" for g in groups if g["state"] != "REMOVED"]
        return found


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Drive:
    """A driver: `cplab run`, with a home of its own unless another's is given, and its records read from outside."""

    def __init__(self, cluster: FailingCluster, home: Path, *arguments: str, tracker: str = NOWHERE) -> None:
        home.mkdir(parents=True, exist_ok=True)
        spec = home.with_suffix(".yaml")
        spec.write_text(yaml.safe_dump(SPEC))
        self.home = home
        self.log = home.with_suffix(f".{secrets.token_hex(2)}.log")
        env = {**os.environ, "RAY_ADDRESS": cluster.address, "CPLAB_HOME": str(home), "PYTHONPATH": str(ROOT)}
        env["MLFLOW_TRACKING_URI"] = tracker
        with self.log.open("w") as log:
            command = [sys.executable, "-m", "service", "run", *(arguments or (str(spec),))]
            self.process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT)

    def rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        path = self.home / "records.db"
        if not path.exists():
            return []
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=10)) as db:
            try:
                return db.execute(query, values).fetchall()
            except sqlite3.OperationalError as error:
                if "no such table" in str(error):
                    return []
                raise

    def num_blocks(self) -> int:
        return int((self.rows("SELECT COUNT(*) FROM block") or [(0,)])[0][0])

    def until(self, reached: Any, limit_s: float = 180) -> bool:
        """Whether it came so far before it ended."""
        deadline_s = time.monotonic() + limit_s
        while not reached():
            if self.process.poll() is not None or time.monotonic() > deadline_s:
                return False
            time.sleep(0.02)
        return True

    def until_a_random_moment(self, rng: random.Random, most: int = NUM_BLOCKS - 4) -> bool:
        """Anywhere between the first words of the sweep and its last launch but one, by how far it is."""
        blocks = rng.randint(0, most)
        is_there = self.until(lambda: self.rows("SELECT 1 FROM sweep") and self.num_blocks() >= blocks)
        time.sleep(rng.random() * 0.4)
        return is_there and self.process.poll() is None

    def end(self, limit_s: float = 180) -> int:
        """Its exit code; -1000 when it does not end."""
        try:
            return self.process.wait(limit_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return -1000

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def complete(self) -> dict[tuple[Any, ...], set[tuple[Any, ...]]]:
        """(cell, launch) that came to its end -> its blocks, with when each was measured."""
        ended = set(self.rows("SELECT cell_id, launch FROM verification WHERE phase='verify after'"))
        found: dict[tuple[Any, ...], set[tuple[Any, ...]]] = {visit: set() for visit in ended}
        for cell_id, launch, *rest in self.rows("SELECT cell_id, launch, kind, block, started_s, wall_us FROM block"):
            if (cell_id, launch) in ended:
                found[cell_id, launch].add(tuple(rest))
        return found

    def lost_and_twice(self, before: dict[tuple[Any, ...], set[tuple[Any, ...]]]) -> tuple[int, int]:
        """Of a sweep that has ended: blocks that are missing, or no longer those that were complete `before`; blocks that have more trials than
        another of their kind, or whose ranks lived in two launches."""
        now = self.complete()
        missing = NUM_BLOCKS - sum(len(blocks) for blocks in now.values())
        changed = sum(len(blocks - now.get(visit, set())) for visit, blocks in before.items())
        trials = self.rows("SELECT kind, COUNT(*) FROM trial GROUP BY cell_id, launch, kind, block")
        usual = {kind: min(n for k, n in trials if k == kind) for kind, _ in trials}
        return missing + changed, sum(n != usual[kind] for kind, n in trials) + len(self.rows("SELECT sweep_id FROM sweep")) - 1

    def ranks(self) -> list[dict[str, Any]]:
        """Of the launch that came up last."""
        rows = self.rows("SELECT ranks FROM launch ORDER BY started_s DESC LIMIT 1")
        return list(json.loads(rows[0][0])) if rows else []

    def all_ranks(self) -> list[int]:
        return [rank["rank_pid"] for (ranks,) in self.rows("SELECT ranks FROM launch") for rank in json.loads(ranks)]

    def attempts(self) -> list[tuple[float, str, str, str]]:
        """(when, cause, decision, evidence) of every one that failed."""
        return [tuple(row) for row in self.rows("SELECT failed_s, cause, decision, evidence FROM attempt ORDER BY number")]

    def next_block_s(self, since_s: float, failed_s: float) -> float | None:
        """From `since_s` to the end of the first block that new ranks measured after the failure was written down."""
        query = "SELECT MIN(started_s + wall_us / 1e6) FROM block WHERE started_s > ?"
        ended_s = self.rows(query, failed_s)[0][0]
        return None if ended_s is None else float(ended_s) - since_s


@contextlib.contextmanager
def small_disk(folder: Path, mebibytes: int) -> Iterator[Path]:
    """A file system of its own. Needs root."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "cplab-bench", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Takes all that is free."""
    filler = folder / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(b"\0" * 4096)
    return filler
