"""The shaped link itself: it is as slow as it says, and nothing of it is left behind, whatever happens."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from experiments.names import Device
from tests.conftest import MINI, make_cell, make_step
from tests.hosts.link import INTERFACE, LinkError, namespaces, remove_leftovers, shaped_link
from tests.hosts.ranks import ROOT, link_group
from tests.workers.asking import prepare, run_block

pytestmark = pytest.mark.hosts

KILLED = """
import os, time
from experiments.names import Device
from tests.hosts.link import shaped_link
from tests.hosts.ranks import link_group
with shaped_link(20) as link:
    group = link_group(link)
    group.launch(60, 20, Device.CPU, [])
    print(*[p.namespace for p in link.places], *[h.where.pid for h in group.handles], *[j.pid for j in group.joined], flush=True)
    time.sleep(60)
"""


def is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pids: list[int]) -> list[int]:
    """Those that are still there after ten seconds."""
    deadline_s = time.monotonic() + 10
    while time.monotonic() < deadline_s and any(map(is_alive, pids)):
        time.sleep(0.05)
    return [pid for pid in pids if is_alive(pid)]


def mine() -> list[str]:
    return [name for name in namespaces() if name.startswith(f"cplab-{os.getpid()}-")]


def shaping(namespace: str) -> str:
    command = ["tc", "-n", namespace, "qdisc", "show", "dev", INTERFACE]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout


def fail_with_ranks_up(pids: list[int]) -> None:
    with shaped_link(20) as link:
        group = link_group(link)
        try:
            group.launch(60, 20, Device.CPU, [])
            pids += [handle.where.pid for handle in group.handles] + [joined.pid for joined in group.joined]
            assert len(mine()) == 2
            raise ZeroDivisionError
        finally:
            group.close()


def test_both_ends_are_shaped_and_ranks_meet_over_them():
    with shaped_link(20) as link:
        for place in link.places:
            assert "tbf" in shaping(place.namespace)
            assert "rate 20Mbit burst 16Kb" in shaping(place.namespace)
        group = link_group(link)
        try:
            group.launch(60, 20, Device.CPU, [])
            assert [handle.where.address for handle in group.handles] == [place.address for place in link.places]
            assert group.shares_clock
            cell = make_cell(make_step((0, 512)), dims=MINI)
            prepare(group, cell)
            reports = run_block(group, ["baseline/gather_alone"])
        finally:
            group.close()
    floor_us = link.floor_us(256 * 256)
    # A link can be late, never early; a rank that comes late itself finds its peer's keys already there.
    for rows in zip(*(report.rows for report in reports), strict=True):
        assert max(row.wire_us for row in rows) > floor_us


def test_an_unshaped_link_says_so():
    with shaped_link(None) as link:
        assert link.floor_us(1 << 20) is None
        assert "tbf" not in shaping(link.places[0].namespace)


def test_nothing_is_left_behind_by_a_failure():
    pids: list[int] = []
    with pytest.raises(ZeroDivisionError):
        fail_with_ranks_up(pids)
    assert mine() == []
    assert len(pids) == 4
    assert wait_until_gone(pids) == []


def test_a_rate_that_the_kernel_refuses_leaves_nothing():
    with pytest.raises(LinkError, match="tbf"), shaped_link(0):
        pass
    assert mine() == []


def test_what_a_killed_process_leaves_goes_with_the_next_link():
    maker = subprocess.Popen([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert maker.stdout is not None
        words = maker.stdout.readline().split()
        names, pids = words[:2], [int(word) for word in words[2:]]
        assert len(pids) == 4
        remove_leftovers()
        assert set(names) <= set(namespaces())  # its maker lives
    finally:
        maker.kill()
        maker.wait()
    assert wait_until_gone(pids) == []
    remove_leftovers()
    assert not set(names) & set(namespaces())
