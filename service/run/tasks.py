"""The tasks of a sweep: every step, in order, and which of them are left where some is measured already."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias

from experiments.spec.cell import Cell
from experiments.spec.experiment import ExperimentSpec
from service.judge.looks import Looks


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

    @property
    def visit(self) -> Visit:
        """What is repeated whole when this fails."""
        return (self.cell.cell_id if self.cell else "", self.cp_size, self.launch)


Visit: TypeAlias = tuple[str, int, int]
"""A cell in one launch: (cell_id, cp_size, launch); an empty id means the launching itself.

Its blocks are of one life of the rank processes: the interval takes what a launch's blocks share (memory, ports, neighbours) for the
launch's, so a visit that was cut off is repeated whole, never continued by other processes.
"""

SETTLED = frozenset({Action.MEASURE, Action.CONTROL, Action.VERIFY_AFTER})
"""What a launch does with a cell once its trials have no trend any more."""


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
                for block in range(plan.blocks):
                    # The account sets arms against controls, so a change of pace must meet both.
                    tasks.append(Task(Action.MEASURE, cp_size, launch, cell, block))
                    tasks.append(Task(Action.CONTROL, cp_size, launch, cell, block))
                if trace and launch == plan.launches - 1:
                    tasks.append(Task(Action.TRACE, cp_size, launch, cell))
                tasks.append(Task(Action.VERIFY_AFTER, cp_size, launch, cell))
            if launch + 1 in looks[:-1]:
                tasks.append(Task(Action.LOOK, cp_size, launch))
        tasks.append(Task(Action.CLOSE, cp_size, plan.last_launches - 1))
    return tasks


def missing_tasks(tasks: Iterable[Task], done: Collection[Visit], invalid: Collection[str] = ()) -> list[Task]:
    """What is left of a plan: no visit that is `done`, nothing of an `invalid` cell (by cell_id).

    Looks stay: each reads the launches before it and nothing else, so it decides again what it has decided.
    """
    left = [t for t in tasks if t.cell is None or (t.visit not in done and t.cell.cell_id not in invalid)]
    sizes = {t.cp_size for t in left if t.cell is not None}
    return [t for t in without_idle_launches(left) if t.cp_size in sizes]


def without_idle_launches(tasks: Iterable[Task]) -> list[Task]:
    """The tasks without launches that would serve no cell."""
    tasks = list(tasks)
    served = {(t.cp_size, t.launch) for t in tasks if t.cell is not None}
    return [t for t in tasks if t.action is not Action.LAUNCH or (t.cp_size, t.launch) in served]
