"""The controller takes a sweep step by step, without a cluster: order, looks, what is told to whom."""

from __future__ import annotations

from collections import Counter

import pytest

from experiments import catalogue
from service.run.orders import arms_with_serial, block_of, control_variants, warm_up_of
from service.run.rank_group import GroupLostError
from service.run.tasks import Action, Task, missing_tasks, plan_tasks
from tests.service.fake_group import ONE_CELL, FakeGroup, blocks_by_launch, controller
from workers.messages import (
    BlockReport,
    Fault,
    RankFault,
    RunBlock,
    TraceCell,
    TraceReport,
    TrialRow,
    VerifyCell,
    VerifyReport,
)


def test_a_sweep_visits_every_cell_in_every_launch():
    made, watcher, groups = controller()
    made.run()
    measured = Counter((e[1].cell.cell_id, e[1].launch, e[2]) for e in watcher.events if e[0] == "measured")
    assert len(measured) == 4 * 5 * 2
    assert set(measured.values()) == {2}
    assert groups[0].launches == 5
    assert groups[0].is_closed
    assert made.failure == ""


def test_launches_alternate_the_order_of_cells():
    spec = catalogue.load("quickstart")
    cells = spec.expand().cells
    order = [
        [t.cell.cell_id for t in plan_tasks(cells, spec) if t.action is Action.PREPARE and t.launch == launch]
        for launch in (0, 1)
    ]
    assert order[0] == order[1][::-1]


def test_a_block_of_controls_follows_every_block_of_arms():
    """What sets arms against controls must not take a change of the machine's pace for a difference between them."""
    made, watcher, _ = controller(overrides=[*ONE_CELL, "measurement.blocks=3"])
    made.run()
    order = [(e[2], e[1].block) for e in watcher.events if e[0] == "measured" and e[1].launch == 0]
    assert order == [(kind, block) for block in range(3) for kind in ("arms", "controls")]


def test_only_the_first_launch_of_a_cell_is_checked_deeply():
    made, _, groups = controller()
    made.run()
    deep = [r.deep for r in groups[0].seen if isinstance(r, VerifyCell)]
    assert sum(deep) == 4
    assert len(deep) == 4 * 5 * 2


def test_each_cp_size_has_its_own_group():
    made, _, groups = controller(overrides=["cells.cp_size=[1,2]"])
    made.run()
    assert [g.launches for g in groups] == [5, 5]
    assert all(g.is_closed for g in groups)


def test_a_faulty_cell_is_invalid_and_measured_no_further():
    bad = [VerifyReport(0, (Fault("overlapped", "bits", "k differs"),), (1,), 3), VerifyReport(1, (), (1,), 3)]
    made, watcher, _ = controller({VerifyCell: bad})
    made.run()
    assert [e[0] for e in watcher.events if e[0] != "launched"] == ["invalid"] * 4
    assert made.failure == ""


@pytest.mark.parametrize(
    ("reports", "says"),
    [
        ([VerifyReport(0, (), (1,), 3), VerifyReport(1, (), (2,), 3)], "same index keys"),
        ([VerifyReport(0, (), (1,), 3), VerifyReport(1, (), (1,), 0)], "made no check"),
    ],
)
def test_ranks_that_disagree_make_a_cell_invalid(reports, says):
    made, watcher, _ = controller({VerifyCell: reports})
    made.run()
    assert says in next(e[2][0].detail for e in watcher.events if e[0] == "invalid")


def test_an_arm_that_breaks_costs_its_cell_and_new_ranks_go_on():
    calls = []

    def verify(request):
        calls.append(request)
        return GroupLostError("rank 0: boom", fault=RankFault("schedule", "boom", "", "overlapped")) if len(calls) == 1 else None

    made, watcher, groups = controller({VerifyCell: verify})
    made.run()
    invalid = [e for e in watcher.events if e[0] == "invalid"]
    assert len(invalid) == 1
    assert invalid[0][2][0].arm == "overlapped"
    assert groups[0].launches == 6
    assert {e[1].cell.cell_id for e in watcher.events if e[0] == "measured"} == {
        c.cell_id for c in catalogue.load("quickstart").expand().cells
    } - {invalid[0][1].cell.cell_id}


def test_a_resumed_sweep_does_what_is_missing_and_nothing_else():
    spec = catalogue.load("quickstart", ["measurement.launches=5"])
    cells = spec.expand().cells
    visits = {t.visit for t in plan_tasks(cells, spec) if t.cell is not None}
    done = {v for v in visits if v[2] < 2} | {(cells[1].cell_id, 2, 2), (cells[1].cell_id, 2, 4)}
    made, watcher, groups = controller(done=done, invalid={cells[3].cell_id})
    made.run()
    measured = {t.visit for t, _ in watcher.of("measured")}
    assert measured == {v for v in visits - done if v[0] != cells[3].cell_id}
    assert groups[0].launches == 3
    nothing, watcher, groups = controller(done=visits)
    nothing.run()
    assert (watcher.events, groups) == ([], [])


def test_a_resumed_sweep_takes_the_looks_again_at_what_they_saw():
    """Launches 5 and 6 of a cell that went on after the first look are on disk: the look reads five launches all the same."""
    asked = []

    def decided(cells, launches):
        asked.append((launches, len(cells)))
        return cells[:1]

    plan = ["measurement.max_launches=13"]
    spec = catalogue.load("quickstart", ["measurement.launches=5", *plan])
    done = {t.visit for t in plan_tasks(spec.expand().cells, spec) if t.cell is not None and t.launch < 5}
    made, watcher, _ = controller(overrides=plan, done=done, decided=decided)
    made.run()
    assert asked == [(5, 4), (8, 3)]
    assert min(blocks_by_launch(watcher)) == 5


def test_launches_that_would_serve_no_cell_are_dropped():
    spec = catalogue.load("quickstart", ["measurement.launches=5"])
    cells = spec.expand().cells
    left = missing_tasks(plan_tasks(cells, spec), {(cell.cell_id, 2, 1) for cell in cells})
    assert {t.launch for t in left if t.action is Action.LAUNCH} == {0, 2, 3, 4}
    assert Task(Action.CLOSE, 2, 4) in left


def test_an_emulated_link_needs_one_clock():
    made, watcher, _ = controller()
    FakeGroup.shares_clock = False
    try:
        made.run()
    finally:
        FakeGroup.shares_clock = True
    invalid = [e for e in watcher.events if e[0] == "invalid"]
    assert {e[1].cell.is_emulated for e in invalid} == {True}
    assert "share no clock" in invalid[0][2][0].detail


def test_controls_of_a_spec_without_serial_bring_one_along():
    spec = catalogue.load("quickstart", ["arms.baseline.schedule=overlap_rotate"])
    assert "_serial" in arms_with_serial(spec.arms)
    assert {"_serial", "_serial/prefilled", "_serial/gather_alone", "baseline/zero_byte"} <= set(control_variants(spec.arms))
    usual = control_variants(catalogue.load("quickstart").arms)
    assert usual == ["baseline/prefilled", "overlapped/prefilled", "overlapped/zero_byte", "baseline/gather_alone"]


def test_blocks_are_balanced_reproducible_and_never_alike():
    block = block_of(["a", "b", "c"], 6, 2, "cell", 1)
    assert block == block_of(["a", "b", "c"], 6, 2, "cell", 1)
    assert block != block_of(["a", "b", "c"], 6, 2, "cell", 2)
    assert Counter((o.variant, o.step) for o in block.orders) == {(v, s): 6 for v in "abc" for s in (0, 1)}
    assert len(warm_up_of(["a", "b"], 3, 1, 0).orders) == 6


def test_a_decided_cell_gets_no_further_launch_and_the_others_do():
    asked, at = [], []

    def decided(cells, launches):
        asked.append([cell.cell_id for cell in cells])
        at.append(launches)
        return cells[:1] if len(asked) == 1 else ()

    made, watcher, _ = controller(overrides=["measurement.max_launches=20"], decided=decided)
    made.run()
    measured = blocks_by_launch(watcher)
    assert at == [5, 8, 13]
    assert [len(cells) for cells in asked] == [4, 3, 3]  # looks after 5, 8 and 13 launches; none after the last
    assert sorted(measured) == list(range(20))
    assert all(len(measured[launch]) == (4 if launch < 5 else 3) for launch in measured)
    assert asked[0][0] not in measured[5]


def test_once_every_cell_is_decided_nothing_is_launched():
    made, watcher, groups = controller(overrides=["measurement.max_launches=20"], decided=lambda cells, _: cells)
    made.run()
    assert groups[0].launches == 5
    assert sorted(blocks_by_launch(watcher)) == list(range(5))
    assert groups[0].is_closed


def test_a_cell_is_not_judged_between_looks():
    asked = []
    made, _, _ = controller(overrides=["measurement.max_launches=5"], decided=lambda cells, _: asked.append(cells))
    made.run()
    assert asked == []


def test_a_time_budget_ends_a_sweep_after_its_first_launches():
    made, watcher, groups = controller(overrides=["measurement.max_launches=50", "measurement.time_budget_s=0.001"])
    made.run()
    assert groups[0].launches == 5
    assert sorted(blocks_by_launch(watcher)) == list(range(5))


def timed_block(elapsed_us):
    """Answers blocks of trials that take `elapsed_us(n)` in the n-th one."""
    blocks = []

    def answer(request):
        blocks.append(request)
        us = elapsed_us(len(blocks))
        rows = tuple(TrialRow(o.variant, o.row, o.step, us, 0.0, 0.0, None, None, None, None) for o in request.orders)
        return [BlockReport(rank, rows, (), 1.0) for rank in range(2)]

    return answer, blocks


def test_warming_up_goes_on_until_two_blocks_agree():
    # 100, 50, 25 us, then steady: the third and the fourth block agree.
    answer, blocks = timed_block(lambda n: max(100.0 / 2 ** (n - 1), 25.0))
    made, watcher, _ = controller({RunBlock: answer}, ONE_CELL)
    made.run()
    first = next(e[2] for e in watcher.events if e[0] == "settled")
    assert first.num_blocks == 4
    assert first.is_settled
    assert "baseline/prefilled" in {o.variant for o in blocks[0].orders}  # everything that will be timed has run once
    assert {o.variant for o in blocks[1].orders} == {"baseline", "overlapped", "_aa"}


def test_a_launch_that_never_settles_is_timed_and_told():
    answer, _ = timed_block(lambda n: 100.0 * 1.2**n)
    made, watcher, _ = controller({RunBlock: answer}, [*ONE_CELL, "measurement.max_warmup_blocks=3"])
    made.run()
    told = [e[2] for e in watcher.events if e[0] == "settled"]
    assert len(told) == 5
    assert all(s.num_blocks == 3 and not s.is_settled for s in told)
    assert len(blocks_by_launch(watcher)) == 5


def test_the_second_copy_of_the_baseline_is_timed_in_every_block_unless_it_is_off():
    for setting, variants in (("true", {"baseline", "overlapped", "_aa"}), ("false", {"baseline", "overlapped"})):
        answer, blocks = timed_block(lambda n: 1.0)
        made, _, _ = controller({RunBlock: answer}, [*ONE_CELL, f"measurement.aa={setting}"])
        made.run()
        arms = [{o.variant for o in block.orders} for block in blocks if not any("/" in o.variant for o in block.orders)]
        assert arms
        assert all(found == variants for found in arms)


def test_every_task_is_timed():
    made, watcher, _ = controller(overrides=ONE_CELL)
    times = []
    watcher.task_ended = lambda task, took_s: times.append((task.action, took_s))
    made.run()
    assert {action for action, _ in times} == set(Action) - {Action.LOOK, Action.TRACE}
    assert all(took_s >= 0 for _, took_s in times)


def test_every_cell_is_traced_once_behind_its_timed_blocks_in_a_launch_that_none_is_spared():
    """Cells decided at the first look get no further launch: the trace must come before it."""
    made, watcher, groups = controller(overrides=["measurement.max_launches=9"], trace=True, decided=lambda cells, _: cells)
    made.run()
    traced = [event[1] for event in watcher.events if event[0] == "traced"]
    assert Counter(task.cell.cell_id for task in traced) == {
        cell.cell_id: 1 for cell in catalogue.load("quickstart").expand().cells
    }
    assert {task.launch for task in traced} == {4}
    assert groups[0].launches == 5, "no cell went on after the look"
    cell = traced[0].cell
    plan = [t.action for t in plan_tasks([cell], made.spec, trace=True) if t.launch == 4 and t.cell is cell]
    assert plan[plan.index(Action.TRACE) - 1 :] == [Action.CONTROL, Action.TRACE, Action.VERIFY_AFTER]
    asked = [request for request in groups[0].seen if isinstance(request, TraceCell)]
    assert {request.arms for request in asked} == {("baseline", "overlapped")}
    assert all(request.shares_clock for request in asked)


def test_nothing_is_traced_unless_asked():
    made, watcher, groups = controller()
    made.run()
    assert not [event for event in watcher.events if event[0] == "traced"]
    assert not [request for request in groups[0].seen if isinstance(request, TraceCell)]


def test_a_wrong_traced_trial_makes_its_cell_invalid():
    bad = [TraceReport(0, (), (Fault("overlapped", "traced trial", "k differs"),), 0, 0), TraceReport(1, (), (), 0, 0)]
    made, watcher, _ = controller({TraceCell: bad}, trace=True)
    made.run()
    assert [event[2][0].check for event in watcher.events if event[0] == "invalid"] == ["traced trial"] * 4
    assert not [event for event in watcher.events if event[0] == "traced"]
