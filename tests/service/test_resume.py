"""kill -9 of the driver at any moment loses no complete block, and a resumed sweep does only what is missing."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import catalogue
from experiments.errors import UserError
from experiments.names import SweepStatus
from experiments.spec.experiment import ExperimentSpec
from service.environment import environment
from service.errors import InfrastructureError
from service.run.local_ranks import local_group
from service.run.policy import Attempt, Decision
from service.run.resume import ended_visits, resumption
from service.run.sweep import measure
from service.run.tasks import Action, plan_tasks
from service.status import status_lines, status_values
from service.store.claim import claimant, claimed
from service.store.judged import load_result
from service.store.records import Records
from tests.conftest import TINY
from tests.service.test_cli import cplab, refused
from tests.service.test_records import reports
from workers.messages import Fault

ROOT = Path(__file__).resolve().parents[2]
KILLS = 3
BLOCKS = 4
"""Of a visit."""
QUICK = {"aa": False, "inputs": 2, "warmup_trials": 1, "max_warmup_blocks": 1}


def small(lengths=(32, 64), **measurement) -> ExperimentSpec:
    """A cell for each length on the simulated device, five launches of two blocks of arms and two of controls."""
    values = {
        "name": "resumed",
        "dims": TINY.model_dump(),
        "device": "simulated",
        "workload": {"kind": "grid", "new_tokens": list(lengths)},
        "cells": {"cp_size": 2, "split": "zigzag", "fabric": "process_group"},
        "arms": {"baseline": {"schedule": "serial"}, "overlapped": {"schedule": "overlap_rotate"}},
        "verify": {"rows_per_rank": 1, "delay_ms": 0},
        "measurement": {"launches": 5, "blocks": 2, "trials_per_block": 2, "control_trials": 2, **QUICK, **measurement},
    }
    return ExperimentSpec.model_validate(values)


def drive(path: Path) -> None:
    """A driver: begins the sweep, or goes on with it."""
    records = Records(path)
    resumed = resumption(records, "last") if records._sweep_ids() else None
    spec = resumed.spec if resumed else small((32,))
    measure(spec, spec.expand(), records, local_group, lambda line: print(line, flush=True), {}, [], resumed=resumed)


def driver(path: Path) -> subprocess.Popen[str]:
    script = "import sys; from pathlib import Path; from tests.service.test_resume import drive; drive(Path(sys.argv[1]))"
    return subprocess.Popen([sys.executable, "-c", script, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)


def rows_of(records: Records, sweep_id: str) -> dict[tuple, set[tuple]]:
    """(cell_id, launch) -> every block's rows, with when they were measured."""
    query = "SELECT cell_id, launch, kind, block, started_s, wall_us FROM block WHERE sweep_id=?"
    found: dict[tuple, set[tuple]] = {}
    for cell_id, launch, *rest in records.connection.execute(query, (sweep_id,)):
        found.setdefault((cell_id, launch), set()).add(tuple(rest))
    return found


@pytest.mark.timeout(90)
def test_kill_9_at_random_moments_loses_no_complete_launch_and_resuming_ends_the_sweep(tmp_path):
    rng, path, kept = random.Random(11), tmp_path / "records.db", {}
    for _ in range(KILLS):
        child = driver(path)
        stop_at = rng.randint(2, 6)
        for number, _line in enumerate(child.stdout, 1):
            if number == stop_at:
                break
        time.sleep(rng.random() * 0.3)
        child.kill()
        child.wait()
        child.stdout.close()
        records = Records(path)
        sweep_id = records.find("last")
        assert claimant(path, sweep_id) is None, "the kernel frees a claim with its holder"
        now = rows_of(records, sweep_id)
        assert all(now[visit] == rows for visit, rows in kept.items()), "what was complete stays as it was"
        kept = {visit: now[visit] for visit in ended_visits(records, sweep_id)}
        assert all(len(rows) == BLOCKS for rows in kept.values())
        status = records.sweep(sweep_id)["status"]
        records.close()
        if status == SweepStatus.FINISHED:
            break
    assert kept
    if status != SweepStatus.FINISHED:
        last = driver(path)
        said, _ = last.communicate(timeout=60)
        assert last.returncode == 0
        assert f"{len(kept)} of their launches kept" in said
    records = Records(path)
    now = rows_of(records, sweep_id)
    assert len(records._sweep_ids()) == 1
    assert all(now[visit] == rows for visit, rows in kept.items())
    assert len(now) == 5
    assert all(len(rows) == BLOCKS for rows in now.values()), "no block is missing and none is twice"
    result = load_result(records, sweep_id)
    assert result.status is SweepStatus.FINISHED
    assert all(cell.is_measured and cell.launches == 5 for cell in result.cells)
    # Every block came from one life: a visit's blocks have as many trials as planned.
    samples = {arm.num_samples for cell in result.cells for arm in cell.arms}
    assert len(samples) == 1
    records.close()


@pytest.fixture
def stopped(tmp_path):
    """Records of a sweep that was killed after one ended visit and a part of another, of a cell that is given up."""
    records, spec = Records(tmp_path / "records.db"), small()
    cells = spec.expand().cells
    records.start_sweep("20260101-000000-aaaa", spec, cells, environment(), None)
    sweep_id = records.find("last")
    for cell, launch in ((cells[0], 0), (cells[1], 0)):
        records.add_block(sweep_id, cell.cell_id, launch, "arms", 0, reports(), 2e3)
    records.add_verification(sweep_id, cells[0].cell_id, 0, Action.VERIFY_AFTER, [])
    records.fail_cell(sweep_id, cells[1].cell_id, "rank 1 died")
    records.end_sweep(sweep_id, SweepStatus.KILLED, "ended by SIGTERM")
    yield records, spec, cells, sweep_id
    records.close()


def test_what_ended_is_done_and_what_was_cut_off_or_given_up_is_not(stopped):
    records, spec, cells, sweep_id = stopped
    records.add_faults(sweep_id, cells[1].cell_id, [Fault("overlapped", "bits", "k differs")])
    found = resumption(records, "last", spec)
    assert found.done == {(cells[0].cell_id, 2, 0)}
    assert found.invalid == {cells[1].cell_id}
    records.reopen(sweep_id, {"at": "now"})
    row = records.sweep(sweep_id)
    assert (row["status"], row["failure"], row["published_uri"]) == (SweepStatus.RUNNING, "", None)
    assert row["environment"]["resumed"] == [{"at": "now"}]
    assert records.cells(sweep_id)[1].failure == ""


def test_a_visit_that_begins_removes_what_another_life_left_of_it_and_nothing_else(stopped):
    records, _, cells, sweep_id = stopped
    records.begin_visit(sweep_id, cells[1].cell_id, 0)
    assert set(rows_of(records, sweep_id)) == {(cells[0].cell_id, 0)}
    assert [len(record.trials) for record in records.cells(sweep_id)] == [4, 0]


def refusal(records, given=None) -> str:
    with pytest.raises(UserError) as caught:
        resumption(records, "last", given)
    return str(caught.value)


def test_what_cannot_be_resumed_is_refused_by_name(stopped):
    records, _, _, sweep_id = stopped
    db = records.connection
    other = small(launches=6)
    assert other.spec_hash in refusal(records, other)
    with claimed(records.path, sweep_id):
        assert "still running (pid" in refusal(records)
    assert claimant(records.path, sweep_id) is None
    changed = {**environment(), "source_digest": "another"}
    for column, value, says in (
        ("status", "FINISHED", "is FINISHED"),
        ("methodology_version", 1, "methodology 1"),
        ("spec_hash", "0" * 16, "0" * 16),
        ("environment", json.dumps(changed), "source digest was another"),
    ):
        before = db.execute(f"SELECT {column} FROM sweep").fetchone()[0]
        db.execute(f"UPDATE sweep SET {column}=?", (value,))
        assert says in refusal(records)
        db.execute(f"UPDATE sweep SET {column}=?", (before,))
    resumption(records, "last")


def test_a_sweep_has_one_writer(tmp_path):
    path = tmp_path / "records.db"
    with claimed(path, "s"):
        assert claimant(path, "s")["pid"]
        with pytest.raises(UserError, match="s is still running"), claimed(path, "s"):
            pass
        with claimed(path, "another"):
            pass
    assert list((tmp_path / "running").iterdir()) == []


def test_an_attempt_is_kept_with_its_cause_and_status_tells_it(stopped):
    records, spec, cells, sweep_id = stopped
    records.reopen(sweep_id, {})
    task = next(t for t in plan_tasks(cells, spec) if t.action is Action.MEASURE)
    for number in (1, 2):
        ranks = ({"rank": 0, "hostname": "h1"},)
        records.add_attempt(sweep_id, task, Attempt(number, "rank 1 on h2: killed", "stack", Decision.REPEAT, ranks))
    kept = records.attempts(sweep_id)
    assert [(a["number"], a["attempt"], a["cause"], a["decision"]) for a in kept] == [
        (1, 1, "rank 1 on h2: killed", Decision.REPEAT),
        (2, 2, "rank 1 on h2: killed", Decision.REPEAT),
    ]
    assert kept[0]["ranks"] == [{"rank": 0, "hostname": "h1"}]
    values = status_values(records)
    (sweep,) = values["running"]
    assert (sweep["visits_done"], sweep["visits_planned"], sweep["failed_attempts"]) == (1, 10, 2)
    assert sweep["driver"] is None
    assert values["lease"] is None
    text = "\n".join(status_lines(records))
    assert f"cplab run --resume {sweep_id}" in text
    assert "rank 1 on h2: killed" in text
    with claimed(records.path, sweep_id):
        assert "pid" in status_lines(records)[0]


def test_the_command_line_refuses_what_it_cannot_resume(tmp_path):
    refused(cplab("run", "--resume", "last", home=tmp_path), "no sweep 'last'")
    refused(cplab("run", home=tmp_path), "SPEC: name one")
    refused(cplab("run", "quickstart", "--plan", "--resume", "last", home=tmp_path), "--plan")
    told = cplab("status", home=tmp_path)
    assert (told.returncode, told.stdout) == (0, "nothing is running\n")
    assert '"running": []' in cplab("status", "--json", home=tmp_path).stdout
    refused(cplab("unlock", "--why", "frozen", home=tmp_path), "RAY_ADDRESS is not set")


@pytest.mark.timeout(90)
def test_a_group_that_loses_a_rank_is_made_anew_and_the_sweep_finishes(tmp_path):
    """A real rank is killed once, in the middle: the attempt is kept with its cause, and nothing is missing."""
    spec, records, groups = small((32,)), Records(tmp_path / "records.db"), []

    def make_group(cp_size):
        groups.append(local_group(cp_size))
        if len(groups) == 1:
            ask, asked = groups[0].ask, []

            def kill_once(requests, timeout_s):
                asked.append(1)
                if len(asked) == 12:
                    os.kill(groups[0].joined[1].pid, signal.SIGKILL)
                return ask(requests, timeout_s)

            groups[0].ask = kill_once
        return groups[-1]

    sweep_id = measure(spec, spec.expand(), records, make_group, lambda _: None, {}, [])
    (attempt,) = records.attempts(sweep_id)
    assert "rank 1 on" in attempt["cause"]
    assert "SIGKILL" in attempt["cause"]
    assert attempt["decision"] == Decision.REPEAT
    assert [rank["rank"] for rank in attempt["ranks"]] == [0, 1]
    result = load_result(records, sweep_id)
    assert result.status is SweepStatus.FINISHED
    assert all(cell.launches == 5 and cell.is_measured for cell in result.cells)
    assert len(groups) == 2
    assert all(len(rows) == BLOCKS for rows in rows_of(records, sweep_id).values())
    records.close()


def test_a_cell_that_was_given_up_is_said_and_the_sweep_failed(tmp_path):
    def make_group(cp_size):
        raise InfrastructureError("the cluster gave no placement")

    records, spec = Records(tmp_path / "records.db"), small(attempts=1)
    sweep_id = measure(spec, spec.expand(), records, make_group, lambda _: None, {}, [])
    result = load_result(records, sweep_id)
    assert result.status is SweepStatus.FAILED
    assert result.failure.startswith("gave up 2 of 2 cells: ")
    assert {cell.failure for cell in result.cells} == {"the cluster gave no placement"}
    assert resumption(records, sweep_id).done == frozenset()
    records.close()


def test_the_catalogue_says_how_often_a_cell_is_tried():
    assert catalogue.load("quickstart", ["measurement.attempts=5"]).measurement.attempts == 5
