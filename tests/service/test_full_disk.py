"""A disk that is full is said before a run and during one, what was complete stays readable, and the sweep is resumed once there is room."""

from __future__ import annotations

import sqlite3
from types import SimpleNamespace

import pytest

from experiments.errors import UserError
from experiments.names import SweepStatus
from service.environment import environment
from service.errors import InfrastructureError
from service.run import sweep as sweep_module
from service.run.local_ranks import local_group
from service.run.preview import preview
from service.run.resume import resumption
from service.run.sweep import measure
from service.store import space
from service.store.judged import load_result
from service.store.records import Records
from service.store.space import RecordsError, needed_bytes, refuse_without_room
from tests.service.test_cli import cplab, refused
from tests.service.test_resume import BLOCKS, rows_of, small


@pytest.mark.timeout(120)
def test_a_disk_that_fills_up_ends_the_sweep_in_one_line_and_loses_no_complete_block(tmp_path):
    """SQLite's own limit plays the disk: the same error, at the same place, without root."""
    spec, records = small((32,)), Records(tmp_path / "records.db")
    db, groups = records.connection, []

    def full_after_two_launches(cp_size):
        groups.append(local_group(cp_size))
        launch = groups[-1].launch

        def launch_and_fill(*arguments):
            launch(*arguments)
            launches = db.execute("SELECT COUNT(*) FROM launch").fetchone()[0]
            if launches == 2:
                db.execute(f"PRAGMA max_page_count={db.execute('PRAGMA page_count').fetchone()[0]}")

        groups[-1].launch = launch_and_fill
        return groups[-1]

    with pytest.raises(RecordsError, match=r"could not be written: database or disk is full.*cplab run --resume") as caught:
        measure(spec, spec.expand(), records, full_after_two_launches, lambda _: None, {}, [])
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, InfrastructureError), "exit code 4"
    sweep_id = records.find("last")
    assert records.sweep(sweep_id)["status"] != SweepStatus.FINISHED  # FAILED where that little could still be written
    assert db.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
    before = rows_of(records, sweep_id)
    records.close()

    records = Records(tmp_path / "records.db")  # there is room again
    resumed = resumption(records, "last")
    assert len(resumed.done) == 2
    measure(spec, spec.expand(), records, local_group, lambda _: None, {}, [], resumed=resumed)
    result, now = load_result(records, sweep_id), rows_of(records, sweep_id)
    assert result.status is SweepStatus.FINISHED
    assert all(now[cell_id, launch] == before[cell_id, launch] for cell_id, _, launch in resumed.done)
    assert {len(rows) for rows in now.values()} == {BLOCKS}
    records.close()


def test_a_transaction_that_fails_leaves_nothing_and_the_next_one_works(tmp_path):
    records, spec = Records(tmp_path / "records.db"), small()
    records.start_sweep("s", spec, spec.expand().cells, environment(), None)
    db = records.connection
    pages = db.execute("PRAGMA page_count").fetchone()[0]
    db.execute(f"PRAGMA max_page_count={pages}")
    with pytest.raises(RecordsError, match="disk is full"):
        records.reopen("s", {"why": "x" * 100_000})
    assert not db.in_transaction
    assert "resumed" not in records.sweep("s")["environment"]
    db.execute(f"PRAGMA max_page_count={pages + 100}")
    records.reopen("s", {"why": "x" * 100_000})
    assert "resumed" in records.sweep("s")["environment"]
    records.close()


def test_a_run_that_would_not_fit_is_refused_before_anything_starts(tmp_path, monkeypatch):
    spec = small()
    previews = preview(spec, spec.expand().cells)
    needed = needed_bytes(spec, previews)
    monkeypatch.setattr(space.shutil, "disk_usage", lambda _: SimpleNamespace(free=needed - 1))
    with pytest.raises(UserError, match=r"CPLAB_HOME: the disk of .* has 8\.\d MiB free.*cplab gc"):
        refuse_without_room(tmp_path, spec, previews)

    def connect():
        raise AssertionError("a cluster was started")

    monkeypatch.setattr(sweep_module, "connect", connect)
    with pytest.raises(UserError, match="MiB free"):
        sweep_module.run_sweep(spec, SimpleNamespace(folder=tmp_path, records=tmp_path / "records.db"), print)
    assert not (tmp_path / "records.db").exists()
    monkeypatch.setattr(space.shutil, "disk_usage", lambda _: SimpleNamespace(free=needed))
    refuse_without_room(tmp_path, spec, previews)


def test_what_a_sweep_needs_is_not_understated(tmp_path):
    """The estimate of a trial's bytes, against a file of real ones."""
    spec, records = small((32,)), Records(tmp_path / "records.db")
    measure(spec, spec.expand(), records, local_group, lambda _: None, {}, [])
    records.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    records.close()
    assert (tmp_path / "records.db").stat().st_size <= needed_bytes(spec, preview(spec, spec.expand().cells))


@pytest.mark.parametrize(
    ("prepare", "says"),
    [
        (lambda path: path.write_bytes(b"no database" * 100), "not a database"),
        (lambda path: _database(path, "CREATE TABLE experiments (name TEXT)"), "is no record file.*'experiments'"),
        (lambda path: _database(path, "PRAGMA user_version=99"), "schema 99, this version reads"),
    ],
)
def test_a_file_that_is_not_ours_is_refused_by_name_and_left_alone(tmp_path, prepare, says):
    path = tmp_path / "records.db"
    prepare(path)
    before = path.read_bytes()
    with pytest.raises(UserError, match=rf"^CPLAB_HOME: .*records\.db.*{says}"):
        Records(path)
    with_tables = sqlite3.connect(path)
    if b"SQLite" in before[:16]:
        assert not with_tables.execute("SELECT 1 FROM sqlite_master WHERE name='sweep'").fetchone()
    with_tables.close()
    refused(cplab("report", "last", home=tmp_path), "CPLAB_HOME")


def _database(path, statement):
    db = sqlite3.connect(path)
    db.execute(statement)
    db.commit()
    db.close()


def test_records_of_an_old_schema_are_taken_over(tmp_path):
    """Schema 1 had neither attempts nor traces, and trials without filler: the tables are made, and nothing is lost."""
    path, spec = tmp_path / "records.db", small()
    records = Records(path)
    records.start_sweep("s", spec, spec.expand().cells, environment(), None)
    for table in ("settling", "spent", "device_state", "attempt", "trace"):
        records.connection.execute(f"DROP TABLE {table}")
    records.connection.execute("PRAGMA user_version=1")
    records.close()
    records = Records(path)
    assert records.sweep("s")["status"] == SweepStatus.RUNNING
    assert records.attempts("s") == []
    assert records.connection.execute("PRAGMA user_version").fetchone()[0] > 1
    records.close()
