"""What it costs an overlap when gloo's event loop gives way to a main lane that computes (`workers.event_loop`).

    python -m tests.benchmarks.bench_prompt_loop [--rate 160] [--tokens 2048] [--skew-us 1000] [--launches 8]

As root, on a link that the kernel paces, a core a rank: `overlap_rotate` as it is, against the same with a loop that gives way throughout; arms of
one cell, so paired trial by trial.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

import torch

from service.store.records import Records
from tests.hosts.link import missing_piece, shaped_link
from tests.hosts.ranks import link_group
from tests.hosts.sweep import FEW_HEADS, ONE_LATE, make_spec, run_on
from workers.event_loop import EventLoop
from workers.fabrics.exchange import Exchange
from workers.indexer.indexer import Indexer, Shard
from workers.schedules import overlap_rotate

ARMS = {
    "baseline": {"schedule": "tests.benchmarks.bench_prompt_loop:overlap_with_a_loop_that_gives_way"},
    "prompt": {"schedule": "overlap_rotate"},
}


def overlap_with_a_loop_that_gives_way(ix: Indexer, shard: Shard, fabric: Exchange) -> tuple[torch.Tensor, torch.Tensor]:
    """`overlap_rotate`; it joins before it returns, so its gather has no other loop."""
    with patch.object(EventLoop, "prompt", lambda loop: contextlib.nullcontext()):
        return overlap_rotate(ix, shard, fabric)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rate", type=float, default=160, help="Mbit/s")
    parser.add_argument("--tokens", type=int, default=2048, help="of a step")
    parser.add_argument("--skew-us", type=float, default=1000, help="how much later one rank comes")
    parser.add_argument("--launches", type=int, default=8)
    options = parser.parse_args()
    if piece := missing_piece():
        sys.exit(f"a shaped link needs {piece}")
    measurement = {"launches": options.launches, "blocks": 1, "trials_per_block": 12, "control_trials": 8, "aa": False}
    workload = {"kind": "grid", "new_tokens": [options.tokens]}
    with tempfile.TemporaryDirectory() as folder, shaped_link(options.rate) as link:
        records = Records(Path(folder) / "records.db")
        try:
            spec = make_spec(
                "prompt-loop",
                measurement,
                dims=FEW_HEADS,
                cells=ONE_LATE | {"skew_us": options.skew_us},
                arms=ARMS,
                workload=workload,
            )
            result = run_on(lambda _: link_group(link), spec, records, {"rate_mbps": options.rate})
        finally:
            records.close()
    gives_way, prompt = result.cells[0].arms
    assert prompt.comparison is not None
    print("\n| event loop | p50 us | gather us | contention us |\n|---|---|---|---|")
    for arm in (gives_way, prompt):
        assert arm.account is not None and arm.latency is not None
        lost_us = arm.account.contention_us
        print(
            f"| {arm.arm} | {arm.latency.p50_us:,.0f} | {arm.gather_p50_us or 0:,.0f} "
            f"| {lost_us.estimate:,.0f} [{lost_us.low:,.0f}, {lost_us.high:,.0f}] |"
        )
    ratio = prompt.comparison.ratio
    print(f"\nprompt over one that gives way, time: {ratio.estimate:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]")


if __name__ == "__main__":
    main()
