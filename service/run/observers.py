"""Who watches a sweep: the records, and the person at the terminal or in the job's log."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from experiments.spec.cell import Cell
from service.run.controller import Observer
from service.run.policy import Attempt, Decision
from service.run.rank_group import RankGroup
from service.run.settling import Settling
from service.run.tasks import Action, Task
from service.store.records import Records
from workers.messages import BlockReport, Fault, TraceReport, VerifyReport


class RecordsObserver(Observer):
    """Writes everything down as it comes."""

    def __init__(self, records: Records, sweep_id: str) -> None:
        self._records, self._sweep_id = records, sweep_id

    def task_started(self, task: Task) -> None:
        if task.action is Action.PREPARE:
            self._records.begin_visit(self._sweep_id, _cell_id(task), task.launch)

    def failed(self, task: Task, attempt: Attempt, repeats: int) -> None:
        self._records.add_attempt(self._sweep_id, task, attempt)

    def given_up(self, cell: Cell, cause: str) -> None:
        self._records.fail_cell(self._sweep_id, cell.cell_id, cause)

    def launched(self, task: Task, group: RankGroup, launch_s: float) -> None:
        self._records.add_launch(self._sweep_id, task.cp_size, task.launch, group.rank_map(), launch_s)

    def prepared(self, task: Task, path: str, floor_us: float | None) -> None:
        self._records.set_path(self._sweep_id, _cell_id(task), path, floor_us)

    def verified(self, task: Task, reports: Sequence[VerifyReport]) -> None:
        self._records.add_verification(self._sweep_id, _cell_id(task), task.launch, task.action, reports)

    def settled(self, task: Task, settling: Settling) -> None:
        self._records.add_settling(
            self._sweep_id, _cell_id(task), task.launch, settling.num_blocks, settling.trend, settling.is_settled
        )

    def measured(self, task: Task, kind: str, reports: Sequence[BlockReport], wall_us: float, shares_clock: bool) -> None:
        self._records.add_block(self._sweep_id, _cell_id(task), task.launch, kind, task.block, reports, wall_us, shares_clock)

    def traced(self, task: Task, reports: Sequence[TraceReport]) -> None:
        self._records.add_trace(self._sweep_id, _cell_id(task), task.launch, reports)

    def invalid(self, task: Task, faults: Sequence[Fault]) -> None:
        self._records.add_faults(self._sweep_id, _cell_id(task), faults)

    def task_ended(self, task: Task, took_s: float) -> None:
        cell_id = task.cell.cell_id if task.cell else ""
        self._records.add_spent(self._sweep_id, cell_id, task.cp_size, task.launch, task.action, task.block, took_s)


def _cell_id(task: Task) -> str:
    assert task.cell is not None
    return task.cell.cell_id


class ProgressBar(Observer):
    """A bar on a terminal."""

    def __init__(self, total: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self._progress = Progress(
            BarColumn(30), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"), transient=True
        )
        self._bar: Any = self._progress.add_task("starting", total=total)
        self._total = total

    def __enter__(self) -> ProgressBar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def task_started(self, task: Task) -> None:
        self._progress.update(self._bar, description=_words(task))

    def task_ended(self, task: Task, took_s: float) -> None:
        self._progress.advance(self._bar)

    def invalid(self, task: Task, faults: Sequence[Fault]) -> None:
        self._progress.console.print(_invalid_words(task, faults), markup=False, highlight=False)

    def failed(self, task: Task, attempt: Attempt, repeats: int) -> None:
        self._total += repeats
        self._progress.update(self._bar, total=self._total)
        if attempt.decision is not Decision.STOP:  # said when the sweep ends
            self._progress.console.print(_failed_words(task, attempt), markup=False, highlight=False)


class PlainLines(Observer):
    """A line for every launch of a cell: what a job's log can show."""

    def __init__(self, total: int) -> None:
        self._total, self._done = total, 0

    def __enter__(self) -> PlainLines:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def task_started(self, task: Task) -> None:
        if task.action in (Action.LAUNCH, Action.PREPARE):
            print(f"[{self._done:4d}/{self._total}] {_words(task)}", flush=True)

    def task_ended(self, task: Task, took_s: float) -> None:
        self._done += 1

    def invalid(self, task: Task, faults: Sequence[Fault]) -> None:
        print(_invalid_words(task, faults), flush=True)

    def failed(self, task: Task, attempt: Attempt, repeats: int) -> None:
        self._total += repeats
        if attempt.decision is not Decision.STOP:  # said when the sweep ends
            print(_failed_words(task, attempt), flush=True)


def progress(total: int) -> ProgressBar | PlainLines:
    """A bar on a terminal, lines elsewhere."""
    return ProgressBar(total) if sys.stdout.isatty() else PlainLines(total)


def _words(task: Task) -> str:
    where = f" {task.cell.label}" if task.cell else f" {task.cp_size} ranks"
    return f"launch {task.launch + 1}: {task.action}{where}"


def _invalid_words(task: Task, faults: Sequence[Fault]) -> str:
    assert task.cell is not None
    first = faults[0]
    return f"INVALID {task.cell.label}: arm {first.arm}: {first.check}: {first.detail}"


def _failed_words(task: Task, attempt: Attempt) -> str:
    what = "giving up" if attempt.decision is Decision.GIVE_UP else str(attempt.decision)
    return f"LOST in {_words(task)}: {attempt.cause}; attempt {attempt.number}: {what}"
