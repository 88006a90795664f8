"""A rank's own cores: shares do not overlap, and every thread of the rank keeps to them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.names import Device
from service.run.local_ranks import local_group
from workers.affinity import share_of_cores


@given(st.sets(st.integers(0, 255), min_size=1, max_size=64), st.integers(1, 80))
def test_shares_are_equal_and_do_not_overlap(cores: set[int], count: int) -> None:
    shares = [share_of_cores(list(cores), index, count) for index in range(count)]
    if count > len(cores):
        assert all(share == tuple(sorted(cores)) for share in shares)
        return
    assert {len(share) for share in shares} == {len(cores) // count}
    assert len(set().union(*shares)) == sum(map(len, shares))
    assert set().union(*shares) <= cores


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core has no shares")
def test_every_thread_of_a_rank_keeps_to_its_share(groups: list) -> None:
    group = local_group(2)
    groups.append(group)
    group.launch(60, 30, Device.CPU, [])
    shares = [set(joined.cores) for joined in group.joined]
    assert not shares[0] & shares[1]
    for joined in group.joined:
        threads = os.listdir(f"/proc/{joined.pid}/task")
        assert len(threads) > 1  # the group's own threads among them
        assert all(os.sched_getaffinity(int(thread)) == set(joined.cores) for thread in threads)


def test_threads_that_were_there_before_move_along() -> None:
    script = (
        "import os, threading, time; from workers.affinity import settle_on;"
        "t = threading.Thread(target=time.sleep, args=(30,), daemon=True); t.start();"
        "one = (min(os.sched_getaffinity(0)),); assert settle_on(one) == one;"
        "assert all(os.sched_getaffinity(int(i)) == set(one) for i in os.listdir('/proc/self/task')); print('moved')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "moved"
