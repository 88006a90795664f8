"""Fabrics keep time: an emulated gather ends no earlier than its link model says, on every rank."""

from __future__ import annotations

import os
import re

import pytest

from experiments.names import Device, FabricKind, Split
from experiments.spec.fabric import FabricSpec
from service.run.local_ranks import local_group
from service.run.rank_group import GroupLostError
from tests.conftest import BOTH_ARMS, make_cell, make_step
from tests.workers.asking import prepare, run_block
from workers.fabrics import FABRICS
from workers.fabrics.transport import CollectiveTransport


def test_every_name_has_a_fabric():
    assert set(FABRICS) == set(FabricKind)


def test_the_floor_is_latency_plus_bytes_over_bandwidth():
    spec = FabricSpec(kind="emulated", bandwidth_mbps=20, latency_us=100)
    assert spec.floor_us(65536) == pytest.approx(100 + 65536 * 8 / 20)
    assert spec.name == "emulated_20mbit_100us"
    assert FabricSpec(kind="process_group").floor_us(10**9) is None


@pytest.mark.parametrize("split", list(Split))
def test_an_emulated_gather_ends_no_earlier_than_its_floor(pair, split):
    cell = make_cell(make_step((0, 512)), split=split, fabric="emulated_100mbit")
    prepare(pair, cell)
    floor_us = cell.fabric.floor_us(256 * 256)
    for report in run_block(pair, ["baseline", "overlapped", "baseline/gather_alone"]):
        for row in report.rows:
            assert row.gather_us >= floor_us
            assert row.late_us >= 0
            assert row.gather_us >= row.wire_us
            assert row.elapsed_us >= row.gather_us * 0.999


def test_the_floor_counts_from_the_last_arrival(pair):
    """Ranks end together though one arrives late: the fast one's wire then takes the lateness on top."""
    prepare(pair, make_cell(make_step((0, 400)), split=Split.INTERLEAVE, fabric="emulated_100mbit"))
    reports = run_block(pair, ["baseline"], trials=6)
    for rows in zip(*(report.rows for report in reports), strict=True):
        last = max(row.arrival_us for row in rows)
        floor_us = 200 * 256 * 8 / 100
        for row in rows:
            # From the arrival to the end of the gather; pad and re-range lie around the wire.
            assert row.arrival_us + row.gather_us >= last + floor_us


def test_real_links_have_no_floor_and_say_their_path(pair):
    cell = make_cell()
    prepare(pair, cell)
    assert all(row.late_us == 0 for row in run_block(pair, ["baseline"])[0].rows)
    assert re.fullmatch(r"gloo over \w+, 2 ranks", pair.joined[0].path)


def test_one_rank_needs_no_group(groups):
    group = local_group(1)
    groups.append(group)
    group.launch(60, 20, Device.CPU, [os.getcwd()])
    prepare(group, make_cell(cp_size=1))
    assert run_block(group, list(BOTH_ARMS))[0].faults == ()
    assert CollectiveTransport(None, "lo").path == "none (one rank)"


@pytest.mark.parametrize("cp_size", [3, 4])
def test_more_ranks_than_cores_still_agree(groups, cp_size):
    group = local_group(cp_size)
    groups.append(group)
    group.launch(90, 30, Device.CPU, [os.getcwd()])
    for split in Split:
        prepare(group, make_cell(make_step((10, 61), (0, 50)), split=split, cp_size=cp_size))
        from tests.workers.asking import verify

        reports = verify(group)
        assert [r.faults for r in reports] == [()] * cp_size
        assert len({r.key_digests for r in reports}) == 1


def test_a_rank_that_never_comes_ends_the_gather_in_time(groups):
    import signal
    import time

    group = local_group(2)
    groups.append(group)
    group.launch(60, 3, Device.CPU, [os.getcwd()])
    prepare(group, make_cell())
    os.kill(group.joined[1].pid, signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(GroupLostError, match="rank 0"):
        run_block(group, ["baseline"])
    assert time.monotonic() - began < 60
