"""The account on a link where nothing is faked: what is hidden is what the window allows. `bench_accounting` does it over many rates."""

from __future__ import annotations

import pytest

from experiments.names import Verdict
from service.store.records import Records
from tests.hosts.link import INTERFACE, shaped_link
from tests.hosts.ranks import link_group
from tests.hosts.sweep import ONE_LATE, make_spec, run_on

pytestmark = pytest.mark.hosts

TOKENS = 1024
"""Long against what the gather itself takes of the one core that a rank may have."""


@pytest.fixture(scope="module")
def cell(tmp_path_factory):
    """`serial` against `overlap_rotate` at 20 Mbit/s, where the gather is some times longer than the rotation."""
    records = Records(tmp_path_factory.mktemp("records") / "records.db")
    measurement = {"launches": 6, "blocks": 4, "trials_per_block": 2, "control_trials": 2, "aa": False}
    try:
        with shaped_link(20) as link:
            workload = {"kind": "grid", "new_tokens": [TOKENS]}
            spec = make_spec("on-a-link", measurement, cells=ONE_LATE, workload=workload)
            result = run_on(lambda _: link_group(link), spec, records, {"rate_mbps": 20})
            return result.cells[0], link.floor_us(TOKENS // 2 * 256)
    finally:
        records.close()


def test_the_overlap_pays(cell):
    found, _ = cell
    assert INTERFACE in found.path
    overlapped = found.arms[1]
    assert overlapped.verdict is Verdict.FASTER
    assert overlapped.account.saved_us.low > 0


def test_the_gather_is_the_links(cell):
    found, floor_us = cell
    assert found.arms[1].account.gather_us.high > floor_us
    assert all(arm.gather_p50_us > floor_us for arm in found.arms)


def test_hidden_is_what_the_window_allows(cell):
    found, _ = cell
    hidden, ideal = found.arms[1].account.hidden, found.arms[1].account.hidden_ideal
    assert hidden.low > 0  # an interval that bounds nothing would agree with anything
    assert hidden.low <= ideal.high
    assert ideal.low <= hidden.high
