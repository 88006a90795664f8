"""One run at a time, on a real Ray: the second is refused or waits, a dead holder frees it, a frozen one is named and ended."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import catalogue
from experiments.errors import UserError
from experiments.names import SweepStatus
from service.errors import ExitCode, InfrastructureError
from service.run.lease import GRACE_S, Heartbeats, Holder, lease, longest_s, unlock, who_holds
from service.run.tasks import Action, Task
from service.store.records import Records
from tests.service.test_cli import cplab

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.timeout(60)

HOLD = """
import sys, time
from service.run.cluster import connect
from service.run.lease import lease
with connect(), lease(sys.argv[1], "night", sys.argv[2], False, print):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture(scope="module")
def address():
    """A cluster of this process that other drivers can reach."""
    ours = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    before = {name: os.environ.get(name) for name in [*ours, "RAY_ADDRESS"]}
    os.environ.update(ours)
    os.environ.pop("RAY_ADDRESS", None)
    import ray

    context = ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=100 * 1024 * 1024,
        _node_ip_address="127.0.0.1",
    )
    yield context.address_info["gcs_address"]
    ray.shutdown()
    for name, value in before.items():
        os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)


@pytest.fixture
def holder(address, tmp_path):
    """Another driver that has the lease."""
    env = {**os.environ, "RAY_ADDRESS": address, "CPLAB_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, "20260101-000000-aaaa", str(tmp_path)], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "held\n"
    yield child
    child.kill()
    child.wait()
    child.stdout.close()
    until_free(20)


def until_free(limit_s: float) -> float:
    began_s = time.monotonic()
    while who_holds() is not None:
        assert time.monotonic() - began_s < limit_s, "the lease is still held"
        time.sleep(0.1)
    return time.monotonic() - began_s


def hold(wait=False, say=lambda _: None):
    return lease("20260101-000000-bbbb", "other", "/home", wait, say)


def test_the_second_is_refused_and_told_who_has_it(holder):
    with pytest.raises(InfrastructureError, match=f"20260101-000000-aaaa .night, pid {holder.pid} on .*alive.*--wait"), hold():
        pass


def test_kill_9_of_the_holder_frees_it_and_the_one_who_waits_gets_it(holder):
    said = []

    def say(line):
        said.append(line)
        holder.send_signal(signal.SIGKILL)
        said.append(time.monotonic())

    with hold(wait=True, say=say):
        assert time.monotonic() - said[1] < 5
        assert said[0].startswith("waiting: the cluster is taken by sweep 20260101-000000-aaaa")
        assert who_holds().sweep_id == "20260101-000000-bbbb"
    until_free(5)


def test_a_frozen_holder_is_named_and_ended_and_a_live_one_is_not(holder, address, tmp_path):
    with pytest.raises(UserError, match=r"alive.*--force"):
        unlock()
    records = Records(tmp_path / "records.db")
    spec = catalogue.load("quickstart")
    records.start_sweep("20260101-000000-aaaa", spec, spec.expand().cells, {}, None)
    holder.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, holder.pid, os.WSTOPPED | os.WNOWAIT)  # a signal takes its time
    assert who_holds().is_frozen
    with pytest.raises(InfrastructureError, match=r"frozen: its process is stopped.*cplab unlock"), hold():
        pass
    done = cplab("unlock", "--why", "it hung since noon", home=tmp_path, RAY_ADDRESS=address)
    assert done.returncode == 0, done.stderr
    assert f"pid {holder.pid}" in done.stdout
    assert holder.wait(10) == -signal.SIGKILL
    assert who_holds() is None
    row = records.sweep("20260101-000000-aaaa")
    assert row["status"] == SweepStatus.KILLED
    assert "it hung since noon" in row["failure"]
    records.close()
    assert unlock() is None


def test_a_run_on_a_taken_cluster_ends_with_who_has_it_and_measures_nothing(holder, address, tmp_path):
    done = cplab("run", "quickstart", home=tmp_path / "mine", RAY_ADDRESS=address)
    assert done.returncode == ExitCode.INFRASTRUCTURE
    assert f"pid {holder.pid}" in done.stderr
    assert "Traceback" not in done.stderr
    assert Records(tmp_path / "mine" / "records.db")._sweep_ids() == []


def test_a_client_without_the_token_is_refused(address, tmp_path):
    """By Ray, before anything of ours runs on the cluster; the line says what to look at."""
    done = cplab("run", "quickstart", home=tmp_path, RAY_ADDRESS=address, RAY_AUTH_TOKEN="0" * 64)
    assert done.returncode == ExitCode.USER_ERROR, done
    assert "token" in done.stderr
    assert "Traceback" not in done.stderr
    assert who_holds() is None
    assert Records(tmp_path / "records.db")._sweep_ids() == []


def test_heartbeats_say_what_is_done_and_a_lost_lease_ends_the_sweep(address):
    import ray

    spec = catalogue.load("quickstart")
    cell = spec.expand().cells[0]
    task = Task(Action.MEASURE, 2, 3, cell)
    with hold() as keeper:
        beats = Heartbeats(keeper, spec.measurement)
        beats.task_started(task)
        ray.get(beats._last)
        told = who_holds()
        assert told.doing == f"launch 4: measure {cell.label}"
        assert told.due_s == longest_s(task, spec.measurement) > spec.measurement.block_timeout_s
        assert not told.is_frozen
        beats.task_started(task)
        ray.kill(keeper)
        until_free(10)
        beats._last = keeper.beat.remote("", 1.0)
        ray.wait([beats._last], timeout=10)
        with pytest.raises(InfrastructureError, match="the lease was lost"):
            beats.task_started(task)


def test_a_holder_is_frozen_once_its_heartbeat_is_overdue():
    def silent(silent_s, is_stopped=False):
        return Holder("s", "night", "/home", "h", 1, 900.0, "launch 1: measure", silent_s, 300.0, is_stopped)

    assert not silent(300 + GRACE_S - 1).is_frozen
    assert silent(300 + GRACE_S + 1).is_frozen
    assert silent(0, is_stopped=True).is_frozen
