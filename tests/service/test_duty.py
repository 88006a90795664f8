"""Duty: what share of the time after settling is inside trials."""

from __future__ import annotations

import math

from service.judge.duty import duty
from service.judge.results import CellRecord
from service.judge.samples import Trial


def trial(*elapsed_us: float) -> Trial:
    none = (None,) * len(elapsed_us)
    return Trial(0, 0, "arms", 0, 0, "baseline", elapsed_us, elapsed_us, none, none, none, none)


def cell(layers: int, *trials: Trial) -> CellRecord:
    return CellRecord({"layers": layers}, list(trials), (), "", {}, "gloo", None)


def test_it_counts_the_slowest_rank_against_what_followed_warming_up():
    spent = [("launch", 3.0), ("warm up", 1.0), ("measure", 2.0), ("measure", 1.0), ("verify after", 1.0)]
    found = duty(spent, [cell(1, trial(1.5e6, 1.0e6)), cell(3, trial(0.3e6, 0.5e6))], frozenset({"measure", "verify after"}))
    assert found.by_action == {"launch": 3.0, "warm up": 1.0, "measure": 3.0, "verify after": 1.0}
    assert found.settled_s == 4.0
    assert found.in_trials_s == 3.0
    assert found.share == 0.75


def test_nothing_settled_is_no_duty():
    assert math.isnan(duty([("launch", 1.0)], [], frozenset({"measure"})).share)
