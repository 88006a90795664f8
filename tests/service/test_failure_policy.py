"""A lost group costs a repetition, a stubborn one its cell, and the sweep goes on; without a cluster."""

from __future__ import annotations

from collections import Counter

import pytest

from experiments import catalogue
from service.errors import InfrastructureError
from service.run.controller import RELAUNCH_PAUSE_S, Controller
from service.run.policy import Decision, Persistent
from service.run.rank_group import GroupLostError
from service.run.tasks import Action, plan_tasks
from tests.service.fake_group import ONE_CELL, FakeGroup, Watcher, blocks_by_launch, controller
from workers.messages import (
    PrepareCell,
    RankFault,
    RunBlock,
)

LOST = GroupLostError("rank 1 on h2: killed by SIGKILL", evidence="rank 0:\nstack")


def failing(kind, *at):
    """A script whose n-th request of that kind loses the group, for every n in `at`, from 1."""
    seen = []

    def answer(_=None):
        seen.append(1)
        return LOST if len(seen) in at else None

    return {kind: answer}


def test_a_lost_rank_costs_the_visit_and_new_ranks_repeat_all_of_it():
    plain, _, untouched = controller(overrides=ONE_CELL)
    plain.run()
    blocks_a_visit = sum(isinstance(r, RunBlock) for r in untouched[0].seen) // 5
    # The group is lost in the second block of the arms of the first launch.
    made, watcher, groups = controller(failing(RunBlock, blocks_a_visit - 1), ONE_CELL)
    made.run()
    ((task, attempt, repeats),) = watcher.of("failed")
    assert (task.action, task.launch, task.block) == (Action.MEASURE, 0, 1)
    assert (attempt.number, attempt.decision, attempt.cause) == (1, Decision.REPEAT, str(LOST))
    assert "stack" in attempt.evidence
    assert repeats == sum(t.cell is not None and t.launch == 0 for t in plan_tasks([task.cell], made.spec))
    # New owners, and a launch of theirs; the old ones are gone.
    assert [g.launches for g in groups] == [1, 5]
    assert groups[0].is_closed
    measured = Counter((t.launch, kind, t.block) for t, kind in watcher.of("measured"))
    assert measured.pop((0, "arms", 0)) == 2, "a launch is one life of the ranks: its first block is measured anew, too"
    assert measured.pop((0, "controls", 0)) == 2
    assert set(measured.values()) == {1}
    assert len(measured) + 2 == 5 * 4
    assert (made.failure, made.given_up) == ("", {})


def test_a_cell_that_keeps_losing_its_ranks_is_given_up_and_the_others_go_on():
    made, watcher, groups = controller()
    first = made.tasks[1].cell
    answer = FakeGroup.ask

    def ask(self, request, timeout_s):
        if isinstance(request, PrepareCell):
            self.cell = request.cell
        if isinstance(request, RunBlock) and self.cell.cell_id == first.cell_id:
            raise LOST
        return answer(self, request, timeout_s)

    FakeGroup.ask = ask
    try:
        made.run()
    finally:
        FakeGroup.ask = answer
    assert [(a.number, a.decision) for _, a, _ in watcher.of("failed")] == [
        (1, Decision.REPEAT),
        (2, Decision.REPEAT),
        (3, Decision.GIVE_UP),
    ]
    assert watcher.of("given up") == [(first, str(LOST))]
    assert made.given_up == {first.label: str(LOST)}
    measured = Counter(t.cell.cell_id for t, kind in watcher.of("measured") if kind == "controls")
    assert first.cell_id not in measured
    assert sorted(measured.values()) == [10, 10, 10], "five launches, two blocks"
    assert [g.is_closed for g in groups] == [True] * 4
    assert made.failure == ""


def test_one_lost_rank_a_launch_gives_up_nothing():
    """Attempts are counted by cell and launch: a cluster that loses a rank now and then does not cost a night's cell."""
    per_visit = 5  # a warm-up of two blocks, two blocks of the arms, two of the controls, less the one that fails
    made, watcher, _ = controller(failing(RunBlock, *range(1, 60, 2 * per_visit)), ONE_CELL)
    made.run()
    assert len(watcher.of("failed")) >= 4
    assert {a.number for _, a, _ in watcher.of("failed")} == {1}
    assert made.given_up == {}
    assert len(blocks_by_launch(watcher)) == 5


def test_a_group_that_comes_up_late_is_waited_for():
    pauses = []
    made, watcher, groups = controller(failing("launch", 1, 2), ONE_CELL, pause=pauses.append)
    made.run()
    assert [(t.action, a.number, a.decision, r) for t, a, r in watcher.of("failed")] == [
        (Action.LAUNCH, 1, Decision.REPEAT, 1),
        (Action.LAUNCH, 2, Decision.REPEAT, 1),
    ]
    assert [p for p in pauses if p] == [RELAUNCH_PAUSE_S, 2 * RELAUNCH_PAUSE_S]
    assert len(groups) == 3
    assert len(blocks_by_launch(watcher)) == 5


def test_a_size_that_never_comes_up_is_given_up_and_the_next_one_goes_on():
    spec = catalogue.load("quickstart", ["measurement.launches=5", "cells.cp_size=[1,2]"])
    groups, watcher = [], Watcher()

    def make_group(cp_size):
        if cp_size == 1:
            raise InfrastructureError("the cluster gave no placement")
        groups.append(FakeGroup({}))
        return groups[-1]

    made = Controller(spec, spec.expand().cells, make_group, [watcher], pause=lambda _: None)
    made.run()
    assert len(watcher.of("failed")) == 3
    assert {cell.cp_size for cell, _ in watcher.of("given up")} == {1}
    assert {t.cell.cp_size for t, _ in watcher.of("measured")} == {2}
    assert "no placement" in next(iter(made.given_up.values()))
    assert [g.launches for g in groups] == [5]


def test_what_only_a_user_can_mend_stops_the_sweep_and_says_why():
    gone = GroupLostError("rank 0: no such checkpoint", "rank 1:\nstack", RankFault("user", "no such checkpoint", ""))
    made, watcher, groups = controller({PrepareCell: gone})
    made.run()
    made.close()
    assert made.is_done
    assert made.failure.startswith("rank 0: no such checkpoint")
    assert "stack" in made.failure
    assert [a.decision for _, a, _ in watcher.of("failed")] == [Decision.STOP]
    assert groups[0].is_closed
    assert made.refusal == "rank 0: no such checkpoint", "nothing was measured: the user's mistake, and no sweep that failed"


def test_what_a_user_breaks_under_way_leaves_what_was_measured():
    seen = []

    def answer(_):
        seen.append(1)
        return (
            GroupLostError("rank 0: no such checkpoint", fault=RankFault("user", "no such checkpoint", ""))
            if len(seen) > 1
            else None
        )

    made, watcher, _groups = controller({PrepareCell: answer})
    made.run()
    assert watcher.of("measured")
    assert made.failure.startswith("rank 0: no such checkpoint")
    assert made.refusal == ""


@pytest.mark.parametrize(
    ("fault", "attempt", "decision"),
    [
        (None, 1, Decision.REPEAT),
        (None, 2, Decision.GIVE_UP),
        (RankFault("rank", "RuntimeError: Connection closed by peer", ""), 1, Decision.REPEAT),
        (RankFault("schedule", "boom", "", "overlapped"), 1, Decision.INVALIDATE),
        (RankFault("user", "no such folder", ""), 1, Decision.STOP),
    ],
)
def test_the_usual_policy(fault, attempt, decision):
    task = controller()[0].tasks[1]
    assert Persistent(2).decide(GroupLostError("rank 0", fault=fault), task, attempt) is decision


def test_another_policy_decides():
    class GiveUp:
        def decide(self, failure, task, attempt):
            return Decision.GIVE_UP

    made, watcher, _groups = controller({RunBlock: LOST}, policy=GiveUp())
    made.run()
    assert len(made.given_up) == len(watcher.of("given up")) == len(watcher.of("failed")) == 4
    assert watcher.of("invalid") == []
