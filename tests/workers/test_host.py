"""The owner of a rank always answers: whatever becomes of the rank is a named failure, never a hang."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import psutil
import pytest

from workers.host import RankHost, RankLostError
from workers.messages import Ping, Pong, RankFault, RunBlock
from workers.standing import ProcessState


@pytest.fixture
def host():
    host = RankHost()
    host.launch()
    yield host
    host.close()


def test_a_rank_lives_in_a_process_of_its_own(host):
    answer = host.ask(Ping(), 30)
    assert isinstance(answer, Pong)
    assert answer.pid != os.getpid()


def test_a_launch_is_a_new_process(host):
    first = host.ask(Ping(), 30).pid
    host.launch()
    second = host.ask(Ping(), 30).pid
    assert first != second
    assert not psutil.pid_exists(first)


def test_a_host_can_be_told_to_end_its_rank_while_it_launches_one(monkeypatch):
    host, started, may_start = RankHost(), threading.Event(), threading.Event()
    start = ForkServerProcess.start

    def start_late(process):
        started.set()
        assert may_start.wait(30)
        start(process)

    monkeypatch.setattr(ForkServerProcess, "start", start_late)
    launching = threading.Thread(target=host.launch)
    launching.start()
    try:
        assert started.wait(30)
        host.kill()
    finally:
        may_start.set()
        launching.join(60)
        host.close()


def test_a_rank_answers_its_own_mistakes(host):
    answer = host.ask(RunBlock(()), 30)
    assert isinstance(answer, RankFault)
    assert answer.kind == "rank"
    assert "AssertionError" in answer.message
    assert isinstance(host.ask(Ping(), 30), Pong)


def test_a_killed_rank_is_named(host):
    pid = host.ask(Ping(), 30).pid
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(RankLostError, match=f"{pid} was killed by SIGKILL"):
        host.ask(Ping(), 30)


def test_a_frozen_rank_runs_out_of_time_and_can_be_ended(host):
    pid = host.ask(Ping(), 30).pid
    os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(RankLostError, match=f"no answer to Ping within .*{pid} is stopped"):
        host.ask(Ping(), 0.5)
    assert time.monotonic() - began < 10
    assert host.stack(0.2) == ""
    standing = host.standing()
    assert standing.state is ProcessState.STOPPED
    assert standing.progress.words == "Ping, no collective entered yet"
    host.kill()
    assert not psutil.pid_exists(pid)
    host.launch()
    assert isinstance(host.ask(Ping(), 30), Pong)


def test_a_living_rank_shows_its_stack(host):
    assert "_serve" in host.stack(3)  # on a busy machine it may still be sending its first answer
    stacks, record = host._testimony(10)
    assert "_serve" in stacks
    assert record == "", "no collective is in flight"


def test_nothing_launched_is_said(host):
    host.kill()
    with pytest.raises(RankLostError, match="no rank process"):
        host.ask(Ping(), 1)


def test_a_rank_that_dies_while_it_starts_is_named(host, tmp_path):
    stacks, host._stacks = host._stacks, tmp_path / "no folder" / "stacks"
    with pytest.raises(RankLostError, match="ended with exit code 1 while it started"):
        host.launch()
    host._stacks = stacks
    host.launch()
    assert isinstance(host.ask(Ping(), 30), Pong)


@pytest.mark.parametrize("is_stopped", [False, True])
def test_a_rank_dies_with_its_owner(is_stopped):
    script = (
        "import sys, time\n"
        "from workers.host import RankHost\n"
        "from workers.messages import Ping\n"
        "host = RankHost(); host.launch(); print(host.ask(Ping(), 60).pid, flush=True); time.sleep(60)\n"
    )
    root = Path(__file__).resolve().parents[2]
    owner = subprocess.Popen([sys.executable, "-c", script], cwd=root, stdout=subprocess.PIPE, text=True)
    pid = int(owner.stdout.readline())
    assert psutil.pid_exists(pid)
    if is_stopped:
        os.kill(pid, signal.SIGSTOP)
    owner.kill()
    owner.wait()
    deadline = time.monotonic() + 15
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_rank_keeps_its_heap(host):
    """Page faults for memory that was just freed are launch noise: the allocator must not hand it back."""
    pid = host.ask(Ping(), 30).pid
    environment = Path(f"/proc/{pid}/environ").read_bytes()
    assert b"MALLOC_TRIM_THRESHOLD_=" in environment
    assert "MALLOC_TRIM_THRESHOLD_" not in os.environ
