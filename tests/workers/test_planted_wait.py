"""A planted wait slows its arm by what it says, moves no bit, and can not be hidden."""

from __future__ import annotations

from statistics import median

import pytest

from experiments import catalogue
from experiments.errors import SpecError
from experiments.names import Device
from experiments.spec.arms import ArmSpec
from service.judge.judging import serial_arm
from service.run.orders import control_variants
from tests.conftest import make_cell
from tests.workers.asking import faults, prepare, run_block

WAIT_US = 700.0
ARMS = {"baseline": ArmSpec(), "slowed": ArmSpec(planted_wait_us=WAIT_US)}


def test_it_is_a_factor_like_the_others():
    assert ARMS["slowed"].differs_from(ARMS["baseline"]) == {"planted_wait_us": ("0.0", "700.0")}


@pytest.mark.parametrize("wait_us", ["-1", ".inf", "soon"])
def test_a_wait_that_is_none_is_refused(wait_us):
    with pytest.raises(SpecError, match=r"arms\.overlapped\.planted_wait_us"):
        catalogue.load("quickstart", [f"arms.overlapped.planted_wait_us={wait_us}"])


def test_it_is_exact_on_simulated_lanes_and_cancels_in_what_is_exposed(pair):
    prepare(pair, make_cell(device=Device.SIMULATED), ARMS)
    rows = run_block(pair, [*ARMS, *control_variants(ARMS)])[0].rows

    def time_of(variant):
        return median(row.elapsed_us for row in rows if row.variant == variant)

    assert time_of("slowed") - time_of("baseline") == pytest.approx(WAIT_US)
    assert time_of("slowed/prefilled") - time_of("baseline/prefilled") == pytest.approx(WAIT_US)


def test_it_moves_no_bit_on_real_ranks(pair):
    prepare(pair, make_cell(), ARMS)
    assert faults(pair) == []
    blocks = run_block(pair, list(ARMS))
    assert [block.faults for block in blocks] == [(), ()]
    assert all(row.elapsed_us >= WAIT_US for block in blocks for row in block.rows if row.variant == "slowed")


def test_a_slowed_arm_is_no_reference_for_the_gather():
    assert serial_arm({"slowed": ArmSpec(planted_wait_us=1), "baseline": ArmSpec()}) == "baseline"
    assert serial_arm({"baseline": ArmSpec(planted_wait_us=1)}) == "_serial"
