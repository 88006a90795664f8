"""A sweep of two ranks without Ray, recorded and judged by the code that users' sweeps go through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from experiments.names import SweepStatus
from experiments.spec.experiment import ExperimentSpec
from service.judge.results import SweepResult
from service.run.rank_group import RankGroup
from service.run.sweep import measure
from service.store.judged import load_result
from service.store.records import Records

ONE_LATE = {"cp_size": 2, "split": "zigzag", "fabric": "process_group", "skew_us": 6000.0}
"""One rank comes later to every gather, in all arms and controls, by more than a tick (4 ms at 250 Hz). gloo's ranks tell each other that they are
ready to receive on the connection that carries the keys: who comes second, and has heard that the first is ready, says so behind its own first
half. An event loop that gives way hears it at the next tick. Without the skew it is chance whether a gather waits (at 80 Mbit/s 26 or 38 ms), and
the mixture differs between arms and controls."""

FEW_HEADS = {"name": "few_heads", "hidden": 256, "q_lora_rank": 128, "num_heads": 16, "topk": 64, "num_layers": 1}
"""Little compute for the keys that it gathers: a step's noise is then small beside its gather. With 64 heads a launch's median moves by some
per cent of 100 ms, and a check of the account has to be that wide."""


def make_spec(name: str, measurement: dict[str, Any], **changes: Any) -> ExperimentSpec:
    """One cell: `serial` against `overlap_rotate`, 512 tokens of `mini` on two ranks, over the links as they are."""
    values: dict[str, Any] = {
        "name": name,
        "dims": "mini",
        "workload": {"kind": "grid", "new_tokens": [512]},
        "cells": {"cp_size": 2, "split": "zigzag", "fabric": "process_group"},
        "arms": {"baseline": {"schedule": "serial"}, "overlapped": {"schedule": "overlap_rotate"}},
        "measurement": measurement,
    }
    return ExperimentSpec.model_validate(values | changes)


def run_on(make_group: Callable[[int], RankGroup], spec: ExperimentSpec, records: Records, link: dict[str, Any]) -> SweepResult:
    """Measures `spec` on that group; `link` goes into the record, so that a shaped link is never taken for a real one.

    Raises:
        RuntimeError: The sweep failed, or a cell is INVALID; says why.
    """
    sweep_id = measure(spec, spec.expand(), records, make_group, print, {"link": link}, [])
    result = load_result(records, sweep_id)
    if result.status is not SweepStatus.FINISHED:
        raise RuntimeError(f"sweep {sweep_id}: {result.failure}")
    for cell in result.cells:
        if not cell.is_measured:
            raise RuntimeError(f"sweep {sweep_id}, cell {cell.label}: {cell.failure} {cell.faults}")
    return result
