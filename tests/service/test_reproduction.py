"""The stored spec runs again: whole or one cell of it, and never under another meaning."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.errors import UserError
from experiments.spec.experiment import ExperimentSpec
from service.environment import environment
from service.run.reproduction import drift, only_cell, stored_spec
from service.run.sweep import replay_json
from service.store.records import Records
from tests.service.synthetic import ENVIRONMENT, home_in, make_spec, make_sweep


def test_the_stored_spec_is_the_spec(tmp_path: Path) -> None:
    spec = make_spec(4)
    records, result = make_sweep(home_in(tmp_path), spec, launches=0)
    assert stored_spec(records, result.sweep_id) == spec


def test_every_cell_can_be_had_alone() -> None:
    spec = ExperimentSpec.model_validate(
        {
            "name": "grid",
            "dims": "mini",
            "workload": {"kind": "grid", "new_tokens": [64, 128], "prefix_tokens": [0, 64], "sequences": [1, 2]},
            "cells": {
                "cp_size": [1, 2],
                "split": ["zigzag", "interleave"],
                "fabric": ["process_group", {"kind": "emulated", "bandwidth_mbps": 7.5, "latency_us": 3}],
                "scope": ["qk", "indexer"],
            },
            "arms": {"baseline": {}, "overlapped": {"schedule": "overlap_rotate"}},
        }
    )
    cells = spec.expand().cells
    assert len(cells) == 128
    for cell in cells[::17]:
        alone = only_cell(spec, cell.cell_id)
        assert [c.cell_id for c in alone.expand().cells] == [cell.cell_id]
        assert alone.measurement == spec.measurement
        assert alone.arms == spec.arms


def test_another_methodology_is_refused_and_names_the_revision(tmp_path: Path) -> None:
    records, result = make_sweep(home_in(tmp_path), make_spec(), launches=0)
    records.connection.execute("UPDATE sweep SET methodology_version = 1")
    with pytest.raises(UserError, match=f"methodology 1.*{ENVIRONMENT['revision']}"):
        stored_spec(records, result.sweep_id)


def test_an_unknown_cell_is_refused_with_what_there_is(tmp_path: Path) -> None:
    records, result = make_sweep(home_in(tmp_path), make_spec(), launches=0)
    with pytest.raises(UserError, match=str(result.cells[1].cell["cell_id"])):
        stored_spec(records, result.sweep_id, "nope")


def test_a_trace_that_has_changed_is_refused(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    lines = [{"timestamp": i, "input_length": 500 + i, "output_length": 1, "hash_ids": [i]} for i in range(3)]
    trace.write_text("".join(json.dumps(line) + "\n" for line in lines))
    spec = make_spec(workload={"kind": "trace", "trace": str(trace)})
    records = Records(home_in(tmp_path).records)
    expansion = spec.expand()
    records.start_sweep("s", spec, expansion.cells, ENVIRONMENT, replay_json(expansion))
    assert stored_spec(records, "s") == spec
    assert len(stored_spec(records, "s", expansion.cells[1].cell_id).expand().cells) == 1
    trace.write_text(json.dumps({**lines[0], "input_length": 400}) + "\n")
    with pytest.raises(UserError, match="its trace file has changed"):
        stored_spec(records, "s")


def test_what_is_not_as_it_was_is_said() -> None:
    now = environment()
    assert drift({**now, "dirty": False}, now) == []
    words = drift(
        {**now, "revision": "abc", "cpu": "another", "versions": {**now["versions"], "torch": "1.0"}, "dirty": True}, now
    )
    assert [line.split()[0] for line in words] == ["revision", "torch", "cpu", "it"]
    assert "uncommitted" in words[-1]
