"""The controller: a state machine that takes a sweep launch by launch and cell by cell.

Launches are the outer loop, so that a cell's launches lie minutes apart and drift becomes spread instead of bias. `step` does one thing and can
be driven without a cluster; what to do about a failure, and which cells are decided at a look, are injected; records, progress and tracking
only observe.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol, TypeAlias

from experiments.names import FabricKind
from experiments.spec.cell import Cell
from experiments.spec.experiment import ExperimentSpec
from service.judge.looks import Looks
from service.run.orders import ARMS, CONTROLS, arms_with_serial, block_of, control_variants, timed_arms, warm_up_of
from service.run.rank_group import GroupLostError, RankGroup
from service.run.settling import Settling
from workers.messages import (
    BlockReport,
    Fault,
    PrepareCell,
    Prepared,
    RunBlock,
    TraceCell,
    TraceReport,
    VerifyCell,
    VerifyReport,
)


class Action(StrEnum):
    """What a step does."""

    LAUNCH = "launch"
    PREPARE = "prepare"
    VERIFY = "verify"
    WARM_UP = "warm up"
    MEASURE = "measure"
    CONTROL = "control"
    TRACE = "trace"
    VERIFY_AFTER = "verify after"
    LOOK = "look"
    CLOSE = "close"


@dataclass(frozen=True)
class Task:
    """One step of a sweep. `cell` is None for what concerns the whole group."""

    action: Action
    cp_size: int
    launch: int
    cell: Cell | None = None
    block: int = 0


SETTLED = frozenset({Action.MEASURE, Action.CONTROL, Action.VERIFY_AFTER})
"""What a launch does with a cell once its trials have no trend any more."""


class Decision(StrEnum):
    """What to do after a failure."""

    GIVE_UP_CELL = "give up the cell"
    STOP = "stop the sweep"


class FailurePolicy(Protocol):
    def decide(self, failure: GroupLostError, task: Task) -> Decision: ...


Decided: TypeAlias = Callable[[Sequence[Cell]], Iterable[Cell]]
"""Which of these cells need no further launch, by what the records hold of them."""


class StopUnlessArm:
    """An arm that cannot run costs its cell; a lost rank or node stops the sweep."""

    def decide(self, failure: GroupLostError, task: Task) -> Decision:
        is_arm = failure.fault is not None and failure.fault.kind == "schedule" and task.cell is not None
        return Decision.GIVE_UP_CELL if is_arm else Decision.STOP


class Observer:
    """What a sweep tells; every method may be overridden."""

    def task_started(self, task: Task) -> None: ...

    def launched(self, task: Task, group: RankGroup, launch_s: float) -> None: ...

    def prepared(self, task: Task, path: str, floor_us: float | None) -> None: ...

    def verified(self, task: Task, reports: Sequence[VerifyReport]) -> None: ...

    def settled(self, task: Task, settling: Settling) -> None: ...

    def measured(self, task: Task, kind: str, reports: Sequence[BlockReport], wall_us: float, shares_clock: bool) -> None: ...

    def traced(self, task: Task, reports: Sequence[TraceReport]) -> None: ...

    def invalid(self, task: Task, faults: Sequence[Fault]) -> None: ...

    def task_ended(self, task: Task, took_s: float) -> None: ...


def plan_tasks(cells: Sequence[Cell], spec: ExperimentSpec, trace: bool = False) -> list[Task]:
    """Every step of a sweep, in order. `trace`: with a trace of each cell, behind its timed blocks of the last launch that all cells get."""
    tasks: list[Task] = []
    plan = spec.measurement
    looks = Looks(plan.launches, plan.last_launches).planned
    for cp_size in sorted({cell.num_ranks for cell in cells}):
        group = [cell for cell in cells if cell.num_ranks == cp_size]
        for launch in range(plan.last_launches):
            tasks.append(Task(Action.LAUNCH, cp_size, launch))
            # Every other launch takes the cells backwards: no cell is always the first after a launch.
            for cell in group if launch % 2 == 0 else group[::-1]:
                tasks.append(Task(Action.PREPARE, cp_size, launch, cell))
                tasks.append(Task(Action.VERIFY, cp_size, launch, cell))
                tasks.append(Task(Action.WARM_UP, cp_size, launch, cell))
                tasks += [Task(Action.MEASURE, cp_size, launch, cell, block) for block in range(plan.blocks)]
                tasks.append(Task(Action.CONTROL, cp_size, launch, cell))
                if trace and launch == plan.launches - 1:
                    tasks.append(Task(Action.TRACE, cp_size, launch, cell))
                tasks.append(Task(Action.VERIFY_AFTER, cp_size, launch, cell))
            if launch + 1 in looks[:-1]:
                tasks.append(Task(Action.LOOK, cp_size, launch))
        tasks.append(Task(Action.CLOSE, cp_size, plan.last_launches - 1))
    return tasks


class Controller:
    """Runs the tasks of a sweep on rank groups made by `make_group(cp_size)`."""

    def __init__(
        self,
        spec: ExperimentSpec,
        cells: Sequence[Cell],
        make_group: Callable[[int], RankGroup],
        observers: Iterable[Observer],
        policy: FailurePolicy | None = None,
        import_paths: Sequence[str] = (),
        decided: Decided = lambda cells: (),
        trace: bool = False,
    ) -> None:
        self.spec = spec
        self.tasks = deque(plan_tasks(cells, spec, trace))
        self.arms = arms_with_serial(timed_arms(spec))
        self.failure: str = ""
        self._make_group, self._observers, self._policy = make_group, list(observers), policy or StopUnlessArm()
        self._import_paths, self._decided = tuple(import_paths), decided
        self._began_s = time.monotonic()
        self._group: RankGroup | None = None
        self._group_size = 0
        self._first_launch_of: dict[str, int] = {}

    def add_observer(self, observer: Observer) -> None:
        self._observers.append(observer)

    @property
    def is_done(self) -> bool:
        return not self.tasks

    def run(self) -> None:
        """All steps. The caller closes, so that it can write down first why a sweep ended."""
        while not self.is_done:
            self.step()

    def step(self) -> Task:
        """Does the next task, and says which it was."""
        task = self.tasks.popleft()
        self._tell("task_started", task)
        began_s = time.monotonic()
        try:
            self._do(task)
        except GroupLostError as error:
            self._fail(task, error)
        self._tell("task_ended", task, time.monotonic() - began_s)
        return task

    def close(self) -> None:
        """Ends the live group, if any."""
        if self._group is not None:
            self._group.close()
        self._group = None

    def _do(self, task: Task) -> None:
        match task.action:
            case Action.LAUNCH:
                self._launch(task)
            case Action.PREPARE:
                self._prepare(task)
            case Action.VERIFY | Action.VERIFY_AFTER:
                self._verify(task)
            case Action.WARM_UP:
                self._warm_up(task)
            case Action.MEASURE | Action.CONTROL:
                self._run_blocks(task)
            case Action.TRACE:
                self._trace(task)
            case Action.LOOK:
                self._look(task)
            case Action.CLOSE:
                self.close()

    def _live_group(self) -> RankGroup:
        assert self._group is not None, "a launch comes before any other task"
        return self._group

    def _launch(self, task: Task) -> None:
        if task.launch >= self.spec.measurement.launches and self._is_out_of_time:
            self._keep_only(task.cp_size, ())
            return
        if self._group is None or self._group_size != task.cp_size:
            self.close()
            self._group, self._group_size = self._make_group(task.cp_size), task.cp_size
        plan = self.spec.measurement
        began_s = time.monotonic()
        self._group.launch(plan.launch_timeout_s, plan.gather_timeout_s, self.spec.device, self._import_paths)
        self._tell("launched", task, self._group, time.monotonic() - began_s)

    def _prepare(self, task: Task) -> None:
        cell, spec = task.cell, self.spec
        assert cell is not None
        if cell.fabric.kind is FabricKind.EMULATED and not self._live_group().shares_clock:
            self._invalidate(
                task,
                [
                    Fault(
                        "*", "fabric", f"{cell.fabric.name}: ranks on several hosts share no clock; use the process_group fabric"
                    )
                ],
            )
            return
        request = PrepareCell(
            cell=cell,
            arms=self.arms,
            weights=spec.weights,
            seed=spec.seed + 7919 * task.launch,
            num_inputs=spec.measurement.inputs,
            verify=spec.verify,
            simulation=spec.simulation,
        )
        answers = self._live_group().ask(request, spec.measurement.block_timeout_s)
        first = answers[0]
        assert isinstance(first, Prepared)
        received = max(first.received_bytes)
        self._tell("prepared", task, first.path, cell.fabric.floor_us(received))

    def _verify(self, task: Task) -> None:
        assert task.cell is not None
        # Against the reference once a cell; every later check is bit for bit against `serial`, which that check has proven.
        deep = task.action is Action.VERIFY and self._first_launch_of.setdefault(task.cell.cell_id, task.launch) == task.launch
        is_first = task.action is Action.VERIFY
        answers = self._live_group().ask(VerifyCell(deep, late=is_first), self.spec.measurement.block_timeout_s)
        reports = [answer for answer in answers if isinstance(answer, VerifyReport)]
        self._tell("verified", task, reports)
        faults = [fault for report in reports for fault in report.faults]
        if len({report.key_digests for report in reports}) > 1:
            faults.append(Fault("*", "agreement", "the ranks do not hold the same index keys"))
        if not all(report.num_checks for report in reports):
            faults.append(Fault("*", "agreement", "a rank made no check"))
        if faults:
            self._invalidate(task, faults)

    def _identity(self, task: Task) -> tuple[object, ...]:
        """What seeds the order of a task's trials."""
        assert task.cell is not None
        return self.spec.seed, task.cell.cell_id, task.launch, task.action, task.block

    def _warm_up(self, task: Task) -> None:
        """Blocks that are not kept: first all variants, so that what is compiled, paged in or allocated lazily is so before anything is
        timed; then the arms, until their times have no trend any more."""
        cell, plan = task.cell, self.spec.measurement
        assert cell is not None
        arms, controls = list(timed_arms(self.spec)), control_variants(self.spec.arms)
        settling = Settling(arms)
        while not settling.is_settled and settling.num_blocks < plan.max_warmup_blocks:
            variants = arms if settling.num_blocks else arms + controls
            identity = *self._identity(task), settling.num_blocks
            block = warm_up_of(variants, plan.warmup_trials, len(cell.steps), *identity)
            reports, _ = self._ask_block(block)
            settling.add(reports)
            if self._invalidate_for(task, reports):
                return
        self._tell("settled", task, settling)

    def _run_blocks(self, task: Task) -> None:
        cell, plan = task.cell, self.spec.measurement
        assert cell is not None
        if task.action is Action.MEASURE:
            kind, variants, trials = ARMS, list(timed_arms(self.spec)), plan.trials_per_block
        else:
            kind, variants, trials = CONTROLS, control_variants(self.spec.arms), plan.control_trials
        reports, wall_us = self._ask_block(block_of(variants, trials, len(cell.steps), *self._identity(task)))
        self._tell("measured", task, kind, reports, wall_us, self._live_group().shares_clock)
        self._invalidate_for(task, reports)

    def _ask_block(self, block: RunBlock) -> tuple[list[BlockReport], float]:
        """Every rank's report, and the wall time of it all, us."""
        began_ns = time.monotonic_ns()
        answers = self._live_group().ask(block, self.spec.measurement.block_timeout_s)
        wall_us = (time.monotonic_ns() - began_ns) / 1e3
        return [answer for answer in answers if isinstance(answer, BlockReport)], wall_us

    def _trace(self, task: Task) -> None:
        """One more trial of each arm, untimed, with the spans of its stages; of a workload's steps the one with most new tokens."""
        cell, group = task.cell, self._live_group()
        assert cell is not None
        step = max(range(len(cell.steps)), key=lambda index: cell.steps[index].new_tokens)
        answers = group.ask(TraceCell(tuple(self.spec.arms), step, group.shares_clock), self.spec.measurement.block_timeout_s)
        reports = [answer for answer in answers if isinstance(answer, TraceReport)]
        faults = [fault for report in reports for fault in report.faults]
        if faults:
            self._invalidate(task, faults)
        else:
            self._tell("traced", task, reports)

    def _look(self, task: Task) -> None:
        """A planned look at the data: cells that are decided get no further launch."""
        left = {id(t.cell): t.cell for t in self.tasks if t.cell is not None and t.cp_size == task.cp_size}
        decided = {cell.cell_id for cell in self._decided(list(left.values()))}
        self._keep_only(task.cp_size, [cell for cell in left.values() if cell.cell_id not in decided])

    def _keep_only(self, cp_size: int, cells: Sequence[Cell]) -> None:
        """Drops what is planned for other cells of that size, and launches and looks that would serve none."""
        kept = {cell.cell_id for cell in cells}
        mine = [t for t in self.tasks if t.cp_size == cp_size and t.action is not Action.CLOSE]
        launches = {t.launch for t in mine if t.cell is not None and t.cell.cell_id in kept}
        dropped = {id(t) for t in mine if t.launch not in launches or (t.cell is not None and t.cell.cell_id not in kept)}
        self.tasks = deque(t for t in self.tasks if id(t) not in dropped)

    @property
    def _is_out_of_time(self) -> bool:
        budget_s = self.spec.measurement.time_budget_s
        return budget_s is not None and time.monotonic() - self._began_s > budget_s

    def _invalidate_for(self, task: Task, reports: Sequence[BlockReport]) -> bool:
        """Whether the reports hold faults; the cell is INVALID then."""
        faults = [fault for report in reports for fault in report.faults]
        if faults:
            self._invalidate(task, faults)
        return bool(faults)

    def _invalidate(self, task: Task, faults: Sequence[Fault]) -> None:
        """The cell shows no speed; what else was planned for it is dropped."""
        self._tell("invalid", task, faults)
        self._drop_cell(task)

    def _drop_cell(self, task: Task) -> None:
        assert task.cell is not None
        self.tasks = deque(t for t in self.tasks if t.cell is not task.cell)

    def _fail(self, task: Task, error: GroupLostError) -> None:
        if self._policy.decide(error, task) is Decision.STOP or task.cell is None:
            self.failure = str(error) + (f"\n{error.evidence}" if error.evidence else "")
            self.tasks.clear()
            return
        arm = error.fault.arm if error.fault else "*"
        self._invalidate(task, [Fault(arm, task.action, str(error))])
        # The ranks are gone: the cells left in this launch need new ones.
        if self.tasks and self.tasks[0].cell is not None:
            self.tasks.appendleft(Task(Action.LAUNCH, task.cp_size, task.launch))

    def _tell(self, event: str, *values: object) -> None:
        for observer in self._observers:
            getattr(observer, event)(*values)
