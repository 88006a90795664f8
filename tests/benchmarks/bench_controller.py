"""What the controller itself takes of a block, with ranks answered in process: dispatch, reduction and records, from 8 to 1,024 ranks.

python tests/benchmarks/bench_controller.py [--ranks 8,64,256,1024] [--plot FILE]

Everything is the real code (RankGroup, Controller, records on disk) but the ranks, whose answers are made in advance, pickled, and unpickled as they
come, as Ray does. Each size runs in a process of its own; its memory is the most that process ever held, less what it had before the sweep.
"""

from __future__ import annotations

import argparse
import json
import pickle
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments import catalogue
from service.run.controller import Controller
from service.run.observers import RecordsObserver
from service.run.rank_group import RankGroup, Whereabouts
from service.run.tasks import Action
from service.store.records import Records
from workers.messages import (
    BlockReport,
    Joined,
    JoinGroup,
    OpenStore,
    PrepareCell,
    Prepared,
    RunBlock,
    StoreOpen,
    TrialRow,
    VerifyCell,
    VerifyReport,
)

LIMIT_S, LIMIT_MIB = 1.0, 1024
TRIALS = {"measurement.trials_per_block": 12, "measurement.blocks": 4, "measurement.launches": 5}


class PlayedRank:
    """Answers from a thread, in its own time; see `RankHandle`."""

    def __init__(self, rank: int, pool: ThreadPoolExecutor, blocks: dict[int, bytes]) -> None:
        """`blocks`: the last block's report, which all ranks share: making it is the ranks' work, and not what is timed."""
        self.rank, self._pool, self._blocks = rank, pool, blocks
        self.where = Whereabouts(
            f"node{rank // 8}", f"node{rank // 8}", f"10.0.{rank // 2048}.{rank // 8 % 256}", "eth0", 16, rank, 0
        )

    def launch(self, import_paths: object) -> Future[int]:
        done: Future[int] = Future()
        done.set_result(self.rank)
        return done

    def ask(self, request: object, timeout_s: float) -> Future[object]:
        pickle.dumps(request)
        return self._pool.submit(lambda: pickle.loads(self._answer(request)))

    def _answer(self, request: object) -> bytes:
        rank = self.rank
        match request:
            case OpenStore():
                answer: object = StoreOpen("127.0.0.1", 1)
            case JoinGroup():
                answer = Joined(rank, rank, "boot", "played", (0,))
            case PrepareCell():
                answer = Prepared(rank, 8, (2048,), "played")
            case VerifyCell():
                answer = VerifyReport(rank, (), (1, 2), 3)
            case RunBlock() if id(request) in self._blocks:
                return self._blocks[id(request)]
            case RunBlock():
                us = 100.123 + rank / 7
                rows = [TrialRow(o.variant, o.row, o.step, us, 1.25, 30.5, 20.75, 18.125, us, 2.5) for o in request.orders]
                answer = BlockReport(rank, tuple(rows), (), 1000.0)
            case _:
                raise AssertionError(request)
        said = pickle.dumps(answer)
        if isinstance(request, RunBlock):
            self._blocks.clear()
            self._blocks[id(request)] = said
        return said

    def kill(self) -> None:
        pass


def one_size(num_ranks: int) -> dict[str, float]:
    """Medians of a block's steps, ms, and the memory of the sweep, MiB."""
    overrides = [f"{key}={value}" for key, value in TRIALS.items()]
    spec = catalogue.load(
        "overlap_vs_baseline", [*overrides, f"cells.cp_size={num_ranks}", "cells.split=zigzag", "workload.new_tokens=65536"]
    )
    cells = spec.expand().cells[:1]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    blocks: list[float] = []
    busy: list[float] = []
    made_blocks: dict[int, bytes] = {}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(4) as pool:
        records = Records(Path(folder) / "records.db")
        records.start_sweep("bench", spec, cells, {}, None)
        group = RankGroup([PlayedRank(rank, pool, made_blocks) for rank in range(num_ranks)])
        made = Controller(spec, cells, lambda _: group, [RecordsObserver(records, "bench")])
        while not made.is_done:
            began_s, cpu_s = time.perf_counter(), time.process_time()
            if made.step().action is Action.MEASURE:
                blocks.append(time.perf_counter() - began_s)
                busy.append(time.process_time() - cpu_s)
        began_s = time.perf_counter()
        record = records.cells("bench")[0]
        read_s = time.perf_counter() - began_s
        assert len(record.trials[0].elapsed_us) == num_ranks
        size = (Path(folder) / "records.db").stat().st_size
        records.close()
    blocks.sort()
    busy.sort()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    trials = len([t for t in record.trials if t.kind == "arms"]) // len(blocks)
    return {
        "ranks": num_ranks,
        "trials_a_block": trials,
        "block_ms": 1e3 * blocks[len(blocks) // 2],
        "slowest_ms": 1e3 * blocks[-1],
        "cpu_ms": 1e3 * busy[len(busy) // 2],
        "read_ms": 1e3 * read_s,
        "grown_mib": (peak - before) / 1024,
        "peak_mib": peak / 1024,
        "records_mib": size / 2**20,
    }


def plot(rows: list[dict[str, float]], file: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    ranks = [row["ranks"] for row in rows]
    figure, axes = plt.subplots(figsize=(5, 3), dpi=90, layout="constrained")
    axes.loglog(ranks, [row["block_ms"] for row in rows], "o-", label="dispatch, reduction and records of a block, ms")
    axes.loglog(ranks, [row["grown_mib"] for row in rows], "s--", label="memory of the controller, MiB")
    axes.loglog(ranks, [rows[-1]["block_ms"] * n / ranks[-1] for n in ranks], ":", color="grey", label="linear")
    axes.axhline(1e3 * LIMIT_S, color="tab:red", linewidth=0.8, label="1 s, about 1 GiB")
    axes.set_xticks(ranks, [f"{n:g}" for n in ranks])
    axes.minorticks_off()
    axes.set_xlabel("ranks")
    axes.legend(fontsize=6)
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="8,32,128,512,1024")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(one_size(arguments.one)))
        return
    rows = []
    print(
        "| ranks | trials a block | block ms (slowest), of CPU ms | reading a sweep ms | controller grew by MiB (peak) | records MiB |"
    )
    print("| --- " * 6 + "|")
    for num_ranks in map(int, arguments.ranks.split(",")):
        command = [sys.executable, __file__, "--one", str(num_ranks)]
        row = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        rows.append(row)
        block = f"{row['block_ms']:.0f} ({row['slowest_ms']:.0f}), {row['cpu_ms']:.0f}"
        memory = f"{row['grown_mib']:.0f} ({row['peak_mib']:.0f})"
        cells = (row["ranks"], row["trials_a_block"], block, f"{row['read_ms']:.0f}", memory, f"{row['records_mib']:.1f}")
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    if arguments.plot:
        plot(rows, arguments.plot)


if __name__ == "__main__":
    main()
