"""All that needs a GPU, in one call: the GPU tests, the kernels' benchmarks, and the experiments, with their results as files.

    python -m tests.benchmarks.on_gpu OUT [--only tests,kernels,nvlink,...]

Ranks are plain child processes of this one, so a machine with one GPU needs no Ray. What is measured goes to OUT/home as records: elsewhere
`CPLAB_HOME=OUT/home cplab report SWEEP` draws it, and `cplab sync SWEEP` publishes it. `deepgemm` runs where the package deep_gemm is installed; the
tests and the kernels' benchmark take it in there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from experiments import catalogue
from service.run.local_ranks import local_group
from service.run.sweep import check, measure
from service.store.home import Home
from service.store.records import Records

SIZES = "workload.new_tokens=[4096,16384,65536]"
FIRST = "cells.fabric=[nvlink4_hgx_h200_first]"
EXPERIMENTS: dict[str, tuple[str, list[str]]] = {
    "nvlink": ("one_gpu", []),
    "two_nodes": (
        "one_gpu",
        [
            "cells.cp_size=[16]",
            "cells.fabric=[hgx_8x400g_2node,one_400g_nic_per_node]",
            "workload.new_tokens=[4096,16384,65536,131072]",
        ],
    ),
    "layer": ("one_gpu_layer", []),
    "interleave": ("one_gpu", ["cells.split=[interleave]", FIRST, SIZES]),
    "streaming": ("one_gpu", ["cells.regime=[streaming]", FIRST, SIZES]),
    "deepgemm": (
        "one_gpu",
        [
            "arms={baseline: {logits: deepgemm}, overlapped: {logits: deepgemm, schedule: overlap_rotate}, "
            "query: {logits: deepgemm, schedule: overlap_query}, our_logits: {}}",
            "cells.scope=[indexer]",
            FIRST,
            SIZES,
        ],
    ),
    "aa": (
        "one_gpu",
        [
            "arms={baseline: {}, equal_1: {}, equal_2: {}, equal_3: {}, equal_4: {}, equal_5: {}}",
            "cells.split=[zigzag,interleave]",
            "workload.new_tokens=[4096,8192,16384,32768,65536]",
        ],
    ),
}
"""A catalogue entry, and what is changed in it."""


def run_tests(out: Path) -> None:
    with (out / "tests.txt").open("w") as log:
        subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "gpu"], stdout=log, stderr=subprocess.STDOUT, check=False)


def run_kernels(out: Path) -> None:
    for name in ("select", "light"):
        with (out / f"kernels_{name}.txt").open("w") as log:
            words = [sys.executable, "-m", f"tests.benchmarks.bench_kernels_{name}", "--out", str(out / f"kernels_{name}.json")]
            subprocess.run(words, stdout=log, stderr=subprocess.STDOUT, check=False)


def run_experiment(name: str, out: Path) -> None:
    """Measures one; its sweep's id goes to OUT/sweeps.json at once."""
    spec = catalogue.load(*EXPERIMENTS[name])
    records = Records(Home(out / "home").records)
    began_s = time.monotonic()
    try:
        sweep_id = measure(spec, check(spec), records, local_group, print, {}, [str(Path.cwd())])
    finally:
        records.close()
    known = out / "sweeps.json"
    sweeps = json.loads(known.read_text()) if known.exists() else {}
    known.write_text(json.dumps({**sweeps, name: {"sweep": sweep_id, "took_s": round(time.monotonic() - began_s, 1)}}, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    installed = [name for name in EXPERIMENTS if name != "deepgemm" or find_spec("deep_gemm")]
    parser.add_argument("--only", default="tests,kernels," + ",".join(installed))
    args = parser.parse_args()
    (args.out / "home").mkdir(parents=True, exist_ok=True)
    steps: dict[str, Callable[[Path], None]] = {"tests": run_tests, "kernels": run_kernels}
    for name in args.only.split(","):
        if name in steps:
            steps[name](args.out)
        else:
            run_experiment(name, args.out)


if __name__ == "__main__":
    main()
