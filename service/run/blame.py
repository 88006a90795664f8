"""Whose fault a lost group is: the first who complains is seldom the one who failed."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from workers.collective_log import is_of_a_collective
from workers.messages import RankFault
from workers.standing import ProcessState, Standing


@dataclass(frozen=True)
class Failure:
    """One rank's failure.

    Attributes:
        fault: What the rank says of itself; None where others say it: it is dead, late, or its node is gone.
        is_late: It has only not answered in time.
    """

    rank: int
    cause: str
    fault: RankFault | None = None
    is_late: bool = False


class GroupLostError(Exception):
    """A rank failed, and the group was ended with it. Says which rank, on which node, and why."""

    def __init__(self, message: str, evidence: str = "", fault: RankFault | None = None) -> None:
        super().__init__(message)
        self.evidence = evidence
        self.fault = fault


def failure_of(rank: int, future: Future[Any]) -> Failure | None:
    """How a rank's future failed; None when it did not, or is not done."""
    if not future.done():
        return None
    error = future.exception()
    if error is not None:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        # Ray puts the actor's traceback before the cause.
        cause = lines[-1] if lines else type(error).__name__
        return Failure(rank, cause, is_late="no answer to" in cause)
    answer = future.result()
    return Failure(rank, answer.message, answer) if isinstance(answer, RankFault) else None


def culprit(failures: Sequence[Failure], standings: Sequence[Standing | None]) -> Failure:
    """The failure to name, of at least one.

    The likelier the cause and not the effect, the sooner: an arm's own error, a dead rank, a frozen one, an owner that is silent, a rank that is held
    in a collective to which all have come, one that has not come to the collective in which the others wait. Else whoever complained first.

    Args:
        standings: Of every rank, in rank order; None where the owner does not answer.
    """
    own = [f for f in failures if f.fault is not None and f.fault.kind in ("schedule", "user")]
    lost = [f for f in failures if f.fault is None and not f.is_late]
    if own or lost:
        return (own or lost)[0]
    first = failures[0]
    for rank, standing in enumerate(standings):
        if standing is not None and standing.state is not ProcessState.ALIVE:
            return _instead(first, rank, f"{standing.obituary}; {standing.progress.words}")
    if silent := [rank for rank, standing in enumerate(standings) if standing is None]:
        return _instead(first, silent[0], "its owner, or the node, does not answer")
    hindmost = min(
        standings, key=lambda s: (s.progress.entered, not s.progress.is_inside) if s is not None else (0, False), default=None
    )
    if hindmost is None:
        return first
    rank, at = standings.index(hindmost), hindmost.progress
    if at.is_inside and (first.is_late or is_of_a_collective(first.cause)):
        # All came to it: what holds it is on the way between them. Others may be out of it, or in the next one, with all that was sent to them.
        held = "every rank is alive and came to it: the link between them is cut or slow, or they do not gather the same"
        return _instead(first, rank, f"held inside collective {at.entered}: {held}")
    if at.entered < (most := max(s.progress.entered for s in standings if s is not None)):
        return _instead(first, rank, f"it did not come to collective {most}: {at.words}")
    return first


def _instead(seen: Failure, rank: int, cause: str) -> Failure:
    told = seen.cause if rank == seen.rank else f"rank {seen.rank}: {seen.cause}"
    return Failure(rank, f"{cause}; {told}", None if rank != seen.rank else seen.fault)
