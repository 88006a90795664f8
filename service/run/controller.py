"""The controller: a state machine that takes a sweep launch by launch and cell by cell.

Launches are the outer loop, so that a cell's launches lie minutes apart and drift becomes spread instead of bias. `step` does one thing and can
be driven without a cluster; what to do about a failure, and which cells are decided at a look, are injected; records, progress and tracking
only observe.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, TypeAlias

from experiments.names import FabricKind
from experiments.spec.cell import Cell
from experiments.spec.experiment import ExperimentSpec
from service.errors import InfrastructureError
from service.run.orders import ARMS, CONTROLS, arms_with_serial, block_of, control_variants, timed_arms, warm_up_of
from service.run.policy import Attempt, Decision, FailurePolicy, Persistent
from service.run.rank_group import GroupLostError, RankGroup
from service.run.settling import Settling
from service.run.tasks import SETTLED, Action, Task, Visit, missing_tasks, plan_tasks, without_idle_launches
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

__all__ = ["SETTLED", "Action", "Controller", "Decided", "Observer", "Task"]

Decided: TypeAlias = Callable[[Sequence[Cell], int], Iterable[Cell]]
"""Which of these cells need no further launch, by what the records hold of their first so many launches."""

RELAUNCH_PAUSE_S = 10.0
"""Before a launching is repeated, for each time that it failed: Ray takes 15 s or so to see that a node is gone, and places on it until then."""


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

    def failed(self, task: Task, attempt: Attempt, repeats: int) -> None:
        """A group was lost; `repeats` tasks are done anew for it."""

    def given_up(self, cell: Cell, cause: str) -> None: ...

    def task_ended(self, task: Task, took_s: float) -> None: ...


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
        decided: Decided = lambda cells, launches: (),
        trace: bool = False,
        done: Collection[Visit] = (),
        invalid: Collection[str] = (),
        spent_s: float = 0.0,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        """
        Args:
            done: Visits that an earlier run of the sweep has ended.
            invalid: Ids of cells that it has found INVALID.
            spent_s: What it took, against the time budget.
            pause: Waits so many seconds.
        """
        self.spec = spec
        self._plan = plan_tasks(cells, spec, trace)
        self.tasks = deque(missing_tasks(self._plan, done, invalid))
        self.arms = arms_with_serial(timed_arms(spec))
        self.failure: str = ""
        self.refusal: str = ""
        """What the user has to mend, where ranks found it before anything was measured; `failure` says so too."""
        self.given_up: dict[str, str] = {}
        """Label of a cell -> why it was given up."""
        self._make_group, self._observers = make_group, list(observers)
        self._policy = policy or Persistent(spec.measurement.attempts)
        self._import_paths, self._decided = tuple(import_paths), decided
        self._began_s = time.monotonic() - spent_s
        self._failures: Counter[Visit] = Counter()
        self._has_measured = bool(done)
        self._ranks: tuple[dict[str, Any], ...] = ()
        self._pause = pause
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
        self._ranks = ()
        self._pause(RELAUNCH_PAUSE_S * self._failures[task.visit])
        if self._group is None or self._group_size != task.cp_size:
            self.close()
            try:
                self._group, self._group_size = self._make_group(task.cp_size), task.cp_size
            except InfrastructureError as error:
                raise GroupLostError(str(error)) from error
        plan = self.spec.measurement
        began_s = time.monotonic()
        self._group.launch(plan.launch_timeout_s, plan.gather_timeout_s, self.spec.device, self._import_paths)
        del self._failures[task.visit]
        self._ranks = tuple(self._group.rank_map())
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
        self._has_measured = True
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
        decided = {cell.cell_id for cell in self._decided(list(left.values()), task.launch + 1)}
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
        self.tasks = deque(without_idle_launches(t for t in self.tasks if t.cell is not task.cell))

    def _fail(self, task: Task, error: GroupLostError) -> None:
        self._failures[task.visit] += 1
        number = self._failures[task.visit]
        decision = self._policy.decide(error, task, number)
        again = self._repeated(task) if decision is Decision.REPEAT else []
        self._tell("failed", task, Attempt(number, str(error), error.evidence, decision, self._ranks), len(again))
        match decision:
            case Decision.STOP:
                self.failure = str(error) + (f"\n{error.evidence}" if error.evidence else "")
                self.refusal = "" if self._has_measured else str(error)
                self.tasks.clear()
                return
            case Decision.INVALIDATE:
                # The fault is the arm's: owners are as good as before, and new rank processes under them will do.
                arm = error.fault.arm if error.fault else "*"
                self._invalidate(task, [Fault(arm, task.action, str(error))])
            case Decision.REPEAT:
                self._lose_group()
                self.tasks = deque([*again, *(t for t in self.tasks if t.cell is None or t.visit != task.visit)])
            case Decision.GIVE_UP:
                self._lose_group()
                self._give_up(task, str(error))
        # The ranks are gone: the cells left in this launch need new ones.
        if self.tasks and self.tasks[0].cell is not None:
            self.tasks.appendleft(Task(Action.LAUNCH, task.cp_size, task.launch))

    def _repeated(self, task: Task) -> list[Task]:
        """The whole visit: what is planned of the cell in this launch, or the launching."""
        return [t for t in self._plan if t.cell is not None and t.visit == task.visit] if task.cell else [task]

    def _lose_group(self) -> None:
        """Owners and placement go with their ranks: who knows which of them can still be trusted. The next launch makes new ones."""
        group, self._group = self._group, None
        if group is not None:
            group.close()

    def _give_up(self, task: Task, cause: str) -> None:
        """The cell, or every cell of that size when no group comes up."""
        left = {t.cell.cell_id: t.cell for t in self.tasks if t.cell is not None and t.cp_size == task.cp_size}
        cells = [task.cell] if task.cell is not None else list(left.values())
        for cell in cells:
            self.given_up[cell.label] = cause
            self._tell("given_up", cell, cause)
        dropped = {cell.cell_id for cell in cells}
        self.tasks = deque(without_idle_launches(t for t in self.tasks if t.cell is None or t.cell.cell_id not in dropped))

    def _tell(self, event: str, *values: object) -> None:
        for observer in self._observers:
            getattr(observer, event)(*values)
