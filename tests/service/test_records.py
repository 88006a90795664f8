"""Nothing is lost, nothing is twice: records survive kills, and repeats replace."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from experiments import catalogue
from experiments.errors import UserError
from experiments.names import Lane, SweepStatus
from service.environment import environment
from service.judge.results import GpuConduct
from service.report.caveats import caveats
from service.store.judged import load_result
from service.store.records import Records
from workers.device_state import DeviceState
from workers.messages import ArmTrace, BlockReport, Fault, TraceReport, TrialRow, VerifyReport
from workers.timeline import Span

SPEC = catalogue.load("quickstart")
CELLS = SPEC.expand().cells


@pytest.fixture
def records(tmp_path):
    records = Records(tmp_path / "records.db")
    records.start_sweep("s1", SPEC, CELLS, environment(), None)
    yield records
    records.close()


def reports(arrivals=(10.0, 13.5), variants=("baseline", "overlapped"), rows=2):
    return [
        BlockReport(
            rank,
            tuple(TrialRow(v, row, 0, 100.0 + rank, 1.0, 2.0, 30.0, 25.0, arrival, 0.5) for row in range(rows) for v in variants),
            (),
            1e3,
        )
        for rank, arrival in enumerate(arrivals)
    ]


def test_a_block_comes_back_as_it_was(records):
    records.add_block("s1", CELLS[0].cell_id, 0, "arms", 0, reports(), 2e3)
    trials = records.cells("s1")[0].trials
    assert len(trials) == 4
    assert trials[0].elapsed_us == (100.0, 101.0)
    assert trials[0].skew_us == 3.5
    assert trials[0].lateness_us == (0.0, 3.5)
    assert [t.variant for t in trials] == ["baseline", "overlapped"] * 2


def test_a_repeated_block_replaces(records):
    for _ in range(2):
        records.add_block("s1", CELLS[0].cell_id, 0, "arms", 0, reports(), 2e3)
    records.add_block("s1", CELLS[0].cell_id, 0, "arms", 0, reports(rows=1), 2e3)
    assert len(records.cells("s1")[0].trials) == 2


def test_arrivals_mean_nothing_without_a_shared_clock(records):
    records.add_block("s1", CELLS[0].cell_id, 0, "arms", 0, reports(), 2e3, shares_clock=False)
    trial = records.cells("s1")[0].trials[0]
    assert trial.skew_us is None
    assert trial.lateness_us == (None, None)
    assert load_result(records, "s1").cells[0].lateness_us == ()


def test_every_ranks_lateness_is_its_mean_behind_the_first(records):
    for block, arrivals in enumerate([(10.0, 13.0), (25.0, 20.0)]):
        records.add_block("s1", CELLS[0].cell_id, 0, "arms", block, reports(arrivals), 2e3)
    records.add_block("s1", CELLS[0].cell_id, 0, "controls", 0, reports((0.0, 500.0)), 2e3)
    assert load_result(records, "s1").cells[0].lateness_us == (2.5, 1.5)


def test_faults_make_a_cell_invalid_and_hide_its_speed(records):
    cell_id = CELLS[1].cell_id
    records.add_block("s1", cell_id, 0, "arms", 0, reports(), 2e3)
    records.add_faults("s1", cell_id, [Fault("overlapped", "bits", "k differs")] * 2)
    cell = load_result(records, "s1").cells[1]
    assert cell.is_invalid
    assert not cell.is_measured
    assert len(cell.faults) == 1
    assert all(arm.latency is None and arm.tokens_per_s is None and arm.comparison is None for arm in cell.arms)
    assert {arm.verdict for arm in cell.arms} == {"INVALID"}


def test_checks_are_summed_up(records):
    two = [VerifyReport(0, (), (1,), 3, recall=0.9995), VerifyReport(1, (), (1,), 4, recall=1.0)]
    records.add_verification("s1", CELLS[0].cell_id, 0, "verify", two)
    records.add_verification("s1", CELLS[0].cell_id, 1, "verify", [VerifyReport(0, (), (1,), 5)])
    checks = records.cells("s1")[0].checks
    assert checks["num_checks"] == 12
    assert checks["recall_r2"] == 0.9995


def test_a_trace_comes_back_as_it_was(records):
    spans = (Span("rotate_q", Lane.MAIN, 0, 10**15, 10**15 + 7), Span("gather", Lane.SIDE, 0, 10**15 + 1, 10**15 + 9))
    reports = [TraceReport(0, (ArmTrace("overlapped", 10**15, 10**15 + 9, spans),), (), -5, 3)]
    assert records.traces("s1") == {}
    for _ in range(2):
        records.add_trace("s1", CELLS[0].cell_id, 4, reports)
    assert records.traces("s1") == {CELLS[0].cell_id: reports}


def test_a_file_from_before_there_were_traces_takes_them(tmp_path):
    path = tmp_path / "records.db"
    Records(path).close()
    db = sqlite3.connect(path)
    db.execute("DROP TABLE trace")
    db.commit()
    db.close()
    assert Records(path).traces("s1") == {}


def test_published_sweeps_are_not_published_again(records):
    assert records.unpublished("uri") == []
    records.end_sweep("s1", SweepStatus.KILLED, "ended by SIGTERM")
    assert records.unpublished("uri") == ["s1"]
    records.mark_published("s1", "uri")
    assert records.unpublished("uri") == []
    assert records.unpublished("another") == ["s1"]


def test_an_unknown_sweep_is_a_users_error(records):
    with pytest.raises(UserError, match="no sweep 's2'"):
        records.sweep("s2")


def test_another_schema_is_refused_by_name(tmp_path):
    path = tmp_path / "records.db"
    Records(path).close()
    db = sqlite3.connect(path)
    db.execute("PRAGMA user_version=99")
    db.commit()
    db.close()
    with pytest.raises(UserError, match="schema 99"):
        Records(path)


def test_what_gpus_did_after_blocks_is_summed_up_and_said(tmp_path):
    records = Records(tmp_path / "records.db")
    records.start_sweep("s1", SPEC, CELLS, environment(), None)
    states = [DeviceState(100.0, 1980, 2600, 40, 300.0), DeviceState(120.0, 1700, 2600, 60, 690.0, ("power cap",))]
    for block in range(2):
        told = [replace(report, device_state=state) for report, state in zip(reports(), states, strict=True)]
        records.add_block("s1", CELLS[0].cell_id, 0, "arms", block, told, 2e3)
    result = load_result(records, "s1")
    assert result.cells[0].gpus == GpuConduct((1700, 1980), {"power cap": 2}, 2, 120.0)
    assert result.cells[1].gpus is None
    assert {"GPU clocks: 1700 to 1980 MHz", "GPU slowed down by power cap after 2 of 2 blocks"} <= set(caveats(result))
    records.close()


def test_records_of_schema_1_are_taken_as_they_are(tmp_path):
    """Their trials know neither filler nor enqueuing, and are judged as before."""
    path = tmp_path / "records.db"
    old = Records(path)
    old.start_sweep("s1", SPEC, CELLS, environment(), None)
    old.add_block("s1", CELLS[0].cell_id, 0, "arms", 0, reports(), 2e3)
    old.close()
    db = sqlite3.connect(path)
    for rowid, ranks in db.execute("SELECT rowid, ranks FROM trial").fetchall():
        db.execute("UPDATE trial SET ranks=? WHERE rowid=?", (json.dumps([rank[:7] for rank in json.loads(ranks)]), rowid))
    db.execute("PRAGMA user_version=1")
    db.commit()
    db.close()
    new = Records(path)
    trials = new.cells("s1")[0].trials
    assert trials[0].elapsed_us == (100.0, 101.0)
    assert trials[0].late_us == (0.5, 0.5)
    assert trials[0].filler_us == trials[0].enqueue_us == (None, None)
    new.add_block("s1", CELLS[0].cell_id, 0, "arms", 1, reports(), 2e3)
    assert load_result(new, "s1").cells[0].arms[0].num_samples == 4
    new.close()
    assert sqlite3.connect(path).execute("PRAGMA user_version").fetchone()[0] == 2


def test_no_database_is_refused(tmp_path):
    path = tmp_path / "records.db"
    path.write_text("these are not the records you look for" * 100)
    with pytest.raises(UserError, match="cannot be opened"):
        Records(path)


def test_kill_9_leaves_whole_blocks(tmp_path):
    """A writer is killed in the middle; what it had committed is there, and no block is half."""
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from tests.service.test_records import CELLS, SPEC, reports\n"
        "from service.store.records import Records\n"
        "records = Records(Path(sys.argv[1])); records.start_sweep('s', SPEC, CELLS, {}, None)\n"
        "for block in range(100000):\n"
        "    records.add_block('s', CELLS[0].cell_id, 0, 'arms', block, reports(rows=10), 1.0)\n"
        "    print(block, flush=True)\n"
    )
    root = Path(__file__).resolve().parents[2]
    writer = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "r.db")], cwd=root, stdout=subprocess.PIPE, text=True)
    for line in writer.stdout:
        if int(line) >= 20:
            break
    writer.kill()
    writer.wait()
    records = Records(tmp_path / "r.db")
    trials = records.cells("s")[0].trials
    blocks = {t.block for t in trials}
    assert len(blocks) >= 21
    assert len(trials) == 20 * len(blocks)
    records.close()
