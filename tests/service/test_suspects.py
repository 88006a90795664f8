"""A flagged A/A names what is likely to blame, and says so when nothing is."""

from __future__ import annotations

from service.judge.results import CellRecord
from service.judge.samples import Trial
from service.judge.suspects import NO_SUSPECT, suspects

QUIET = [{"level": "ok", "subject": "neighbours", "text": "nobody else computes"}]
BUSY = [
    {"level": "ok", "subject": "clock", "text": "scaling governor 'performance'"},
    {"level": "warning", "subject": "neighbours", "text": "cc1plus (pid 7, 98% of a core): numbers will be noisy"},
]


def record(*launch_ms: float, unsettled: int = 0) -> CellRecord:
    none = (None, None)
    trials = [
        Trial(launch, 0, "arms", row, 0, "baseline", (ms * 1e3, ms * 999), (0.0, 0.0), none, none, none, None, none)
        for launch, ms in enumerate(launch_ms)
        for row in range(3)
    ]
    return CellRecord({"label": "a cell"}, trials, (), "", {"unsettled_launches": unsettled}, "gloo", None)


def test_a_neighbour_that_was_there_comes_first():
    found = suspects(BUSY, [record(5.0, 5.0, 5.0)])
    assert found == ("neighbours: cc1plus (pid 7, 98% of a core): numbers will be noisy",)


def test_a_drifting_baseline_is_named_with_its_direction():
    assert suspects(QUIET, [record(5.0, 5.2, 5.4, 5.6)]) == ("drift: the baseline of a cell went up by 11% over the launches",)
    assert "down by" in suspects(QUIET, [record(5.6, 5.4, 5.2, 5.0)])[0]


def test_a_jump_is_no_drift():
    (found,) = suspects(QUIET, [record(5.0, 7.0, 7.0, 5.0)])
    assert found.startswith("clock or neighbours: the baseline of a cell took 5.00 ms in one launch and 7.00 ms in another")


def test_unsettled_launches_are_named():
    assert suspects(QUIET, [record(5.0, 5.0, 5.0, unsettled=2)])[0].startswith("trend: 2 launches of a cell")


def test_nothing_seen_is_said():
    assert suspects(QUIET, [record(5.0, 5.01, 5.0)]) == (NO_SUSPECT,)
    assert suspects(QUIET, [record(5.0, 9.0)]) == (NO_SUSPECT,)  # two launches show no drift
