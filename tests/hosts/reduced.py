"""`overlap_vs_baseline`, reduced to what three ranks on two cores can show, and what became of it."""

from __future__ import annotations

from service.judge.results import SweepResult
from service.store.judged import load_result
from service.store.records import Records
from tests.hosts.bench import Bench

REDUCED = (
    # Half of the heads that V3.2 has, as GLM-5: three ranks that rotate on two cores leave their own gather no core, so one that is shorter than the
    # rotation is not hidden by it. One that is longer has a core to itself for its rest.
    "dims={name: mini_32_heads, hidden: 256, q_lora_rank: 128, num_heads: 32, topk: 64, num_layers: 2}",
    *("workload.new_tokens=[768]", "cells.cp_size=[3]", "cells.split=[zigzag]", "cells.regime=[drained]"),
    *("measurement.blocks=1", "measurement.trials_per_block=8", "measurement.control_trials=8"),
)


def words_of(settings: list[str]) -> list[str]:
    """As the command line takes them."""
    return [word for setting in (*REDUCED, *settings) for word in ("--set", setting)]


def last_result(found: Bench) -> SweepResult:
    """The newest sweep of the head's records, as judged."""
    records = Records(found.head.folder / "home/.cplab/records.db")
    try:
        return load_result(records, records.find("last"))
    finally:
        records.close()
