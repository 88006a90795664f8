"""A head that is gone ends the sweep with its name: Ray would end the process with exit code 1, which here says "regression"."""

from __future__ import annotations

import socket
import time

import pytest

from experiments.names import SweepStatus
from service.errors import SweepKilledError
from service.run import head, sweep
from service.store.home import Home
from service.store.records import Records
from tests.service.test_resume import small


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(head, "PERIOD_S", 0.05)
    monkeypatch.setattr(head, "LOST_AFTER_S", 0.2)
    monkeypatch.setattr(sweep, "_reasons", [])
    monkeypatch.setattr(sweep, "CLEAN_UP_S", 1e6)  # this process is not to end itself


@pytest.fixture
def control_store():
    server = socket.create_server(("127.0.0.1", 0), backlog=128)
    yield server
    server.close()


def address(server: socket.socket) -> str:
    host, port = server.getsockname()
    return f"{host}:{port}"


@pytest.mark.timeout(60)
def test_a_head_that_is_gone_is_the_reason_why_the_sweep_ends(control_store, capsys):
    where = address(control_store)
    with sweep._signals_raise(), head.watched_head(where, sweep._reasons.append):
        time.sleep(0.5)
        control_store.close()
        with pytest.raises(SweepKilledError, match=rf"the head of the cluster \({where}\) does not answer"):
            time.sleep(30)
    said = capsys.readouterr().err
    assert said.startswith("cplab: failed: the head of the cluster")
    assert "cplab run --resume last" in said
    assert len(said.splitlines()) == 1


def test_a_head_that_answers_again_is_not_lost(control_store, monkeypatch):
    where, lost = address(control_store), []
    monkeypatch.setattr(head, "LOST_AFTER_S", 5.0)
    with head.watched_head(where, lost.append):
        control_store.close()
        time.sleep(0.3)
        with socket.create_server(("127.0.0.1", int(where.rpartition(":")[2])), backlog=128):
            time.sleep(0.3)
    assert lost == []


def test_the_records_say_so_though_the_main_thread_is_stuck(tmp_path):
    spec, home = small(), Home(tmp_path)
    records = Records(home.records)
    records.start_sweep("s", spec, spec.expand().cells, {}, None)
    sweep._head_lost(home, "s", "the head of the cluster is gone")
    row = records.sweep("s")
    assert (row["status"], row["failure"]) == (SweepStatus.KILLED, "the head of the cluster is gone")
    records.close()
