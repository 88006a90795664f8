"""Shipped schedules are right on real gloo ranks; broken ones are caught, and it is known by which check."""

from __future__ import annotations

import pytest

from experiments.errors import SpecError
from experiments.names import Device, Lane, Schedule, Scope, Split, Stages
from experiments.spec.arms import ArmSpec
from service.run.local_ranks import local_group
from service.run.rank_group import GroupLostError
from tests.conftest import make_cell, make_step
from tests.workers.asking import faults, prepare, run_block, verify
from workers.indexer.stage_sets import STAGE_SETS
from workers.lanes import LANES
from workers.schedules import SCHEDULES, resolve_schedule

MUTANTS = "tests.workers.mutants"


def arms(function: str) -> dict[str, ArmSpec]:
    return {"baseline": ArmSpec(), "mutant": ArmSpec(schedule=f"{MUTANTS}:{function}")}


@pytest.mark.parametrize("split", list(Split))
@pytest.mark.parametrize("fabric", ["process_group", "emulated_100mbit"])
@pytest.mark.parametrize("scope", list(Scope))
def test_shipped_schedules_agree_bit_for_bit(pair, split, fabric, scope):
    prepare(pair, make_cell(make_step((5, 64), (0, 37)), split=split, fabric=fabric, scope=scope))
    reports = verify(pair)
    assert [r.faults for r in reports] == [(), ()]
    assert reports[0].key_digests == reports[1].key_digests
    assert all(r.num_checks > 20 for r in reports)
    blocks = run_block(pair, ["baseline", "overlapped", "overlapped/prefilled", "overlapped/zero_byte", "baseline/gather_alone"])
    assert [b.faults for b in blocks] == [(), ()]


def test_a_users_own_schedule_runs(pair):
    prepare(pair, make_cell(), arms("overlap_again"))
    assert faults(pair) == []


@pytest.mark.parametrize(
    ("mutant", "check"),
    [
        ("no_join", "without joining"),
        ("joins_too_late", "k of step"),
        ("no_fork", "k of step"),
        ("gathers_before_rotation", "k of step"),
        ("reuses_buffer", "k of step"),
        ("never_rotates_q", "q of step"),
        ("gathers_twice", "gathered 2 times"),
    ],
)
def test_mutants_are_caught_by_verification(pair, mutant, check):
    prepare(pair, make_cell(make_step((0, 512))), arms(mutant))
    found = faults(pair)
    assert found
    assert {f.arm for f in found} == {"mutant"}
    assert any(check in f.detail for f in found)


@pytest.mark.parametrize(("mutant", "late"), [("joins_too_late", Lane.SIDE), ("no_fork", Lane.MAIN)])
def test_a_race_that_luck_may_hide_is_caught_by_the_lane_that_is_late(pair, mutant, late):
    prepare(pair, make_cell(make_step((0, 512))), arms(mutant))
    assert f"late {late} lane" in {fault.check for fault in faults(pair)}


def test_mutants_are_caught_while_they_are_timed(pair):
    prepare(pair, make_cell(), arms("reuses_buffer"))
    assert all(block.faults for block in run_block(pair, ["baseline", "mutant"]))


@pytest.mark.parametrize(("mutant", "says"), [("raises", "KeyError"), ("returns_nothing", "NoneType")])
def test_a_schedule_that_breaks_costs_the_group_and_names_the_arm(groups, mutant, says):
    group = local_group(2)
    groups.append(group)
    import os

    from experiments.names import Device

    group.launch(60, 20, Device.CPU, [os.getcwd()])
    prepare(group, make_cell(), arms(mutant))
    with pytest.raises(GroupLostError, match="arm 'mutant'") as caught:
        verify(group)
    assert says in str(caught.value)
    assert caught.value.fault is not None
    assert caught.value.fault.kind == "schedule"


def test_every_name_has_a_function():
    assert set(SCHEDULES) == set(Schedule)
    assert set(STAGE_SETS) == set(Stages)
    assert set(LANES) == set(Device)


@pytest.mark.parametrize("name", ["no_such_module:f", f"{MUTANTS}:no_such_function", "json:__name__"])
def test_a_schedule_that_does_not_import_is_a_users_error(name):
    with pytest.raises(SpecError, match="schedule"):
        resolve_schedule(name)
