"""How a rank stands when its group is lost: what its owner can see of it from outside, and what it still says itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from workers.collective_log import Progress


class ProcessState(StrEnum):
    """Of the rank's process."""

    ALIVE = "alive"
    STOPPED = "stopped"
    """SIGSTOP, or a debugger: it is there, and does nothing."""
    DEAD = "dead"


@dataclass(frozen=True)
class Standing:
    """See the module.

    Attributes:
        obituary: How it ended; empty while it lives.
        progress: The collectives it has entered.
        stack: Of all its Python threads; empty when it is dead or stopped.
        flight_record: NCCL's flight recorder, as JSON; empty where there is none.
    """

    state: ProcessState
    obituary: str = ""
    progress: Progress = field(default_factory=Progress)
    stack: str = ""
    flight_record: str = ""

    @property
    def text(self) -> str:
        """For a reader: a line, and the stacks."""
        how = self.obituary or self.state
        parts = [f"{how}; {self.progress.words}", self.stack.rstrip()]
        if self.flight_record:
            parts.append(f"NCCL flight recorder: {self.flight_record}")
        return "\n".join(part for part in parts if part)


def is_stopped(pid: int) -> bool:
    """Whether the process exists and is stopped or traced, by the kernel's word."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] in ("T", "t")
