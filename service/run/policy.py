"""What to do about a failure: decided by what failed, in which task, and how often that has failed by now."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from service.run.blame import GroupLostError
from service.run.tasks import Task


class Decision(StrEnum):
    """What to do after a failure."""

    INVALIDATE = "the cell is INVALID"
    REPEAT = "repeat with new ranks"
    GIVE_UP = "give up"
    """The cell; where no group comes up, all cells of that size. The sweep goes on with the others."""
    STOP = "stop the sweep"


@dataclass(frozen=True)
class Attempt:
    """One that failed.

    Attributes:
        number: Which it was, from 1, of this cell in this launch, or of this launching in a row.
        cause: One line: rank, node, what happened, in which request.
        evidence: The stacks of the ranks that lived.
        ranks: rank -> (node, process) of the group that was lost; empty when none had come up.
    """

    number: int
    cause: str
    evidence: str
    decision: Decision
    ranks: tuple[dict[str, Any], ...] = ()


class FailurePolicy(Protocol):
    def decide(self, failure: GroupLostError, task: Task, attempt: int) -> Decision:
        """`attempt`: of this visit, from 1 (see `Attempt.number`)."""
        ...


@dataclass(frozen=True)
class Persistent:
    """An arm that cannot run costs its cell, at once: it fails for a reason. A lost rank or node costs another attempt, `attempts` in all, and
    then its cell. What only a user can mend, such as a checkpoint that is gone, stops the sweep."""

    attempts: int

    def decide(self, failure: GroupLostError, task: Task, attempt: int) -> Decision:
        kind = failure.fault.kind if failure.fault is not None else ""
        if kind == "user":
            return Decision.STOP
        if kind == "schedule" and task.cell is not None:
            return Decision.INVALIDATE
        return Decision.REPEAT if attempt < self.attempts else Decision.GIVE_UP
