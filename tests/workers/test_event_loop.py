"""gloo's event loop: gives way to every other thread of its rank, except while a gather is under way beside a main lane that computes."""

from __future__ import annotations

import contextlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from experiments.names import Device
from service.run.local_ranks import local_group
from service.run.rank_group import RankGroup
from tests.conftest import make_cell
from tests.workers.asking import prepare, run_block
from workers.event_loop import NAME, EventLoop

LATE_US = 300e3
"""Rank 1 comes that much later to a gather: rank 0's is under way for as long."""


@pytest.fixture
def launched(groups: list) -> RankGroup:
    group = local_group(2)
    groups.append(group)
    group.launch(60, 30, Device.CPU, [])
    return group


def policies_of(pid: int) -> dict[int, int]:
    return {int(thread): os.sched_getscheduler(int(thread)) for thread in os.listdir(f"/proc/{pid}/task")}


def loop_of(pid: int) -> int:
    (thread,) = [thread for thread, policy in policies_of(pid).items() if policy == os.SCHED_BATCH]
    return thread


def test_the_event_loop_of_a_rank_gives_way_and_no_other_thread_does(launched: RankGroup) -> None:
    for joined in launched.joined:
        tasks = Path(f"/proc/{joined.pid}/task")
        names = {int(task.name): (task / "comm").read_text().strip() for task in tasks.iterdir()}
        loop = loop_of(joined.pid)
        assert loop != joined.pid
        assert not names[loop].startswith("pt_")  # the senders are torch's
        if NAME in names.values():  # torch 2.11 has no name for it
            assert names[loop] == NAME


@pytest.mark.parametrize(("arm", "is_prompt"), [("baseline", False), ("overlapped", True), ("overlapped/zero_byte", False)])
def test_it_is_prompt_while_a_gather_is_under_way_on_the_side_lane_and_only_then(
    launched: RankGroup, arm: str, is_prompt: bool
) -> None:
    prepare(launched, make_cell(skew_us=LATE_US))
    run_block(launched, [arm], trials=1)
    pid = launched.joined[0].pid
    loop, seen = loop_of(pid), set()
    with ThreadPoolExecutor(1) as executor:
        block = executor.submit(run_block, launched, [arm], 3)
        while not block.done():
            seen.add(os.sched_getscheduler(loop))
    assert (os.SCHED_OTHER in seen) == is_prompt
    assert os.SCHED_BATCH in seen
    assert os.sched_getscheduler(loop) == os.SCHED_BATCH


def test_it_gives_way_again_when_the_gather_fails() -> None:
    ends, ids = threading.Event(), []
    thread = threading.Thread(target=lambda: (ids.append(threading.get_native_id()), ends.wait(30)))
    thread.start()
    try:
        while not ids:
            pass
        loop = EventLoop(ids)
        assert loop
        assert os.sched_getscheduler(ids[0]) == os.SCHED_BATCH
        with contextlib.suppress(RuntimeError), loop.prompt():
            assert os.sched_getscheduler(ids[0]) == os.SCHED_OTHER
            raise RuntimeError("a rank is gone")
        assert os.sched_getscheduler(ids[0]) == os.SCHED_BATCH
    finally:
        ends.set()
        thread.join()
    with loop.prompt():
        """A thread that is gone is nobody's error."""


def test_a_rank_without_a_group_has_none() -> None:
    assert not EventLoop()
