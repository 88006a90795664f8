"""An injected skew makes the last rank late, in every arm alike, and it is seen where ranks arrive."""

from __future__ import annotations

import pytest

from experiments import catalogue
from experiments.errors import SpecError
from experiments.names import Device
from experiments.spec.simulation import SimulationSpec
from tests.conftest import make_cell
from tests.workers.asking import faults, prepare, run_block

VARIANTS = ["baseline", "overlapped", "baseline/gather_alone"]


def test_a_skew_is_a_coordinate_and_none_is_the_old_cell():
    plain, skewed = (
        catalogue.load(
            "quickstart", ["workload.new_tokens=512", "cells.split=zigzag", "cells.fabric=process_group", "cells.skew_us=[0,250]"]
        )
        .expand()
        .cells
    )
    assert plain == catalogue.load("quickstart", ["workload.new_tokens=512"]).expand().cells[0]
    assert plain.cell_id == "ad62b9e95bb3"
    assert plain.cell_id != skewed.cell_id
    assert skewed.label == f"{plain.label}-skew250us"
    assert skewed.as_json()["skew_us"] == 250


@pytest.mark.parametrize("override", ["cells.skew_us=-1", "cells.skew_us=[5,5]", "cells.skew_us=many"])
def test_a_skew_that_is_none_is_refused(override):
    with pytest.raises(SpecError, match=r"cells\.skew_us"):
        catalogue.load("quickstart", [override])


def test_a_single_rank_can_not_be_late():
    with pytest.raises(SpecError, match="drop 1 from cp_size"):
        catalogue.load("quickstart", ["cells.cp_size=[1,2]", "cells.skew_us=5"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_others_wait_for_a_late_rank_on_simulated_lanes(pair, variant):
    simulation = SimulationSpec(gather_us=100)
    times = {}
    for skew_us in (0, 400):
        prepare(pair, make_cell(device=Device.SIMULATED, skew_us=skew_us), simulation=simulation)
        times[skew_us] = [report.rows[0] for report in run_block(pair, [variant], trials=1)]
    (first, last), (plain, _) = times[400], times[0]
    assert last.arrival_us - first.arrival_us == pytest.approx(400)
    assert first.gather_us == pytest.approx(500)
    assert last.gather_us == pytest.approx(100)
    assert last.elapsed_us == pytest.approx(plain.elapsed_us)
    assert first.elapsed_us == pytest.approx(plain.elapsed_us + 400, rel=0.01)


def test_the_last_rank_is_late_on_real_ranks(pair):
    """Its start is held back by a stated time after a barrier; only its own preemption could hide that."""
    prepare(pair, make_cell(skew_us=20_000))
    assert faults(pair) == []
    reports = run_block(pair, VARIANTS)
    assert [report.faults for report in reports] == [(), ()]
    lateness = sorted(last.arrival_us - first.arrival_us for first, last in zip(*(r.rows for r in reports), strict=True))
    assert lateness[len(lateness) // 2] > 10_000
