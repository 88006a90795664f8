"""How far the host is ahead of the device when a trial begins."""

import time

import pytest

from tests.workers.one_gpu import HAS_CUDA
from workers.fabrics.transport import CollectiveTransport
from workers.lanes.cuda import ENQUEUE_SHARE, HEAD_START_US, CudaLanes

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120), pytest.mark.skipif(not HAS_CUDA, reason="needs a CUDA device")]


@pytest.fixture
def lanes():
    lanes = CudaLanes(20.0)
    yield lanes
    lanes.close()


def run_trial(lanes: CudaLanes, enqueued_in_s: float) -> None:
    lanes.meet(CollectiveTransport(None, "lo"))
    lanes.mark()
    time.sleep(enqueued_in_s)
    lanes.mark()
    lanes.drain()


def test_a_head_start_outlasts_the_slowest_recent_trial(lanes):
    run_trial(lanes, 0.002)
    for _ in range(10):
        run_trial(lanes, 0.0)
    assert lanes.head_start_us >= HEAD_START_US + ENQUEUE_SHARE * 2000


def test_marks_between_trials_are_no_part_of_one(lanes):
    """As preparing a cell leaves them: seconds after the last trial, or before the first."""
    lanes.mark()
    run_trial(lanes, 0.0)
    before_us = lanes.head_start_us
    time.sleep(0.05)
    lanes.mark()
    run_trial(lanes, 0.0)
    assert lanes.head_start_us < before_us + 10_000


def test_a_slow_trial_is_forgotten(lanes):
    run_trial(lanes, 0.01)
    slow_us = lanes.head_start_us
    for _ in range(64):
        run_trial(lanes, 0.0)
    assert lanes.head_start_us < slow_us
