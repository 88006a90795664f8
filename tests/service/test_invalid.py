"""Every mutant costs its cell the verdict, whatever floor the slip is on: from the rank's check to INVALID without a speed."""

from __future__ import annotations

import os

import pytest

from experiments import catalogue
from experiments.errors import UserError
from experiments.names import SweepStatus
from service.judge.verdict import Verdict
from service.run.local_ranks import local_group
from service.run.sweep import measure
from service.store.judged import load_result
from service.store.records import Records

SMALL = [
    *("workload.new_tokens=600", "cells.split=zigzag", "cells.fabric=process_group", "measurement.launches=5"),
    *("measurement.blocks=1", "measurement.trials_per_block=2", "measurement.control_trials=2", "measurement.warmup_trials=1"),
]


@pytest.mark.parametrize(
    ("mutant", "says"),
    [
        ("mutants:no_join", "without joining"),
        ("mutants:joins_too_late", "k of step"),
        ("mutants:no_fork", "k of step"),
        ("mutants:gathers_before_rotation", "k of step"),
        ("mutants:reuses_buffer", "k of step"),
        ("mutants:never_rotates_q", "q of step"),
        ("mutants_of_ranks:plan_of_another_rank", "gathered keys"),
        ("mutants_of_ranks:ke_one_early", "top-k"),
        ("mutants_of_ranks:ke_one_late", "top-k"),
        ("mutants_of_ranks:interleaved_rope", "rope"),
    ],
)
def test_a_mutant_is_invalid_and_shows_no_speed(tmp_path, mutant, says):
    spec = catalogue.load("quickstart", [*SMALL, f"arms.overlapped.schedule=tests.workers.{mutant}"])
    records = Records(tmp_path / "records.db")
    sweep_id = measure(spec, spec.expand(), records, local_group, lambda _: None, {}, [os.getcwd()])
    result = load_result(records, sweep_id)
    records.close()
    assert result.failure == ""
    (cell,) = result.cells
    assert cell.is_invalid
    assert any(says in f"{fault.check}: {fault.detail}" for fault in cell.faults)
    for arm in cell.arms:
        assert arm.verdict is Verdict.INVALID
        assert (arm.latency, arm.tokens_per_s, arm.comparison, arm.account) == (None, None, None, None)


def test_what_only_ranks_can_see_is_refused_like_any_mistake(tmp_path, capfd):
    """A folder that the driver's node need not have: no verdict of anything, one line, and a sweep that says why it ended."""
    spec = catalogue.load("quickstart", [*SMALL, f"weights.checkpoint={tmp_path / 'gone'}"])
    records = Records(tmp_path / "records.db")
    with pytest.raises(UserError, match=r"^rank \d on .*weights.checkpoint.*no folder.* \[PrepareCell\]$"):
        measure(spec, spec.expand(), records, local_group, lambda _: None, {}, [os.getcwd()])
    ((status, failure),) = records.connection.execute("SELECT status, failure FROM sweep").fetchall()
    records.close()
    assert status == SweepStatus.FAILED
    assert "no folder" in failure
    assert "LOST" not in capfd.readouterr().out
