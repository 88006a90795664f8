"""What a GPU reports is not laid on the arm that ran: a rank that died may have left it, and is to be named; else the rank whose GPU it is."""

from __future__ import annotations

import os

import pytest

from experiments.names import Device
from experiments.spec.arms import ArmSpec
from service.run.local_ranks import local_group
from service.run.rank_group import GroupLostError
from tests.conftest import make_cell
from tests.workers.asking import prepare, verify

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def three():
    group = local_group(3)
    yield group
    group.close()


@pytest.mark.parametrize(
    ("schedule", "names"),
    [
        ("rank_2_is_killed", r"^rank 2 on .*: the rank process \d+ was killed by SIGKILL"),
        ("device_of_rank_1_fails", r"^rank 1 on .*AcceleratorError: CUDA error: an illegal memory access was encountered"),
    ],
)
def test_the_rank_that_broke_is_named(three, schedule, names):
    three.launch(60, 5, Device.CPU, [os.getcwd()])
    prepare(
        three,
        make_cell(cp_size=3),
        {"baseline": ArmSpec(), "x": ArmSpec(schedule=f"tests.workers.mutants_of_devices:{schedule}")},
    )
    with pytest.raises(GroupLostError, match=names) as caught:
        verify(three)
    fault = caught.value.fault
    assert fault is None or fault.kind == "rank", "a group is worth another attempt, on new ranks"
    assert "\n" not in str(caught.value), "CUDA's advice is in the evidence alone"
