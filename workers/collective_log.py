"""Which collective this rank has entered, and which it has left: kept where its owner can read it, whatever becomes of the rank.

A shared page of a file, written with a few stores a collective (under a microsecond) and read from another process without asking: a rank that is
frozen, dead or stuck cannot be asked. On CUDA a collective is left once it is enqueued; how far the device is tells NCCL's flight recorder.
"""

from __future__ import annotations

import mmap
import struct
import time
from dataclasses import dataclass
from pathlib import Path

NAMES = ("", "all_gather", "barrier", "align")
_NUM_WORDS = 4
"""Words of 64 bits: entered, left, when the last was entered (monotonic ns), its name."""
_DOING_BYTES = 96
SIZE = 8 * _NUM_WORDS + _DOING_BYTES


def is_of_a_collective(words: str) -> bool:
    """Whether an error is one of a collective's: torch raises a RuntimeError for them as for all else."""
    return any(name in words.lower() for name in ("gloo", "nccl", "connection"))


@dataclass(frozen=True)
class Progress:
    """How far a rank is.

    Attributes:
        entered: Collectives of this life that it has entered, and `left` those it came out of.
        name: Of the one that it entered last; that was `since_s` ago.
        doing: The request and the arm it is at.
    """

    entered: int = 0
    left: int = 0
    name: str = ""
    since_s: float = 0.0
    doing: str = ""

    @property
    def is_inside(self) -> bool:
        """Whether it has not come out of the last one, also because that failed."""
        return self.entered > self.left

    @property
    def words(self) -> str:
        """One line."""
        at = f"{self.doing}, " if self.doing else ""
        if not self.entered:
            return f"{at}no collective entered yet"
        where = "inside" if self.is_inside else "out of"
        return f"{at}{where} collective {self.entered} ({self.name}, entered {self.since_s:.1f} s ago)"


class CollectiveLog:
    """The writing end. Without a file it keeps its counts to itself."""

    def __init__(self, path: Path | None = None) -> None:
        """`path`: a file of SIZE bytes, shared with the owner."""
        if path is None:
            page = mmap.mmap(-1, SIZE)
        else:
            with path.open("r+b") as file:
                page = mmap.mmap(file.fileno(), SIZE)
        self._words = memoryview(page)[: 8 * _NUM_WORDS].cast("Q")
        self._doing = memoryview(page)[8 * _NUM_WORDS :]

    def doing(self, words: str) -> None:
        """What the rank is about to do; outside of what is timed."""
        self._doing[:] = words.encode()[:_DOING_BYTES].ljust(_DOING_BYTES, b"\0")

    def enter(self, name: str) -> None:
        """A collective, one of NAMES."""
        self._words[2], self._words[3] = time.monotonic_ns(), NAMES.index(name)
        self._words[0] += 1

    def leave(self) -> None:
        """It ended well. One that fails is never left: its communicator is of no use any more."""
        self._words[1] = self._words[0]


def blank(path: Path) -> None:
    """An empty page for a new rank."""
    path.write_bytes(bytes(SIZE))


def read_progress(path: Path) -> Progress:
    """What the page says; on the rank's host only (monotonic clocks are a host's)."""
    page = path.read_bytes()
    if len(page) < SIZE:
        return Progress()
    entered, left, since_ns, name = struct.unpack_from("<4Q", page)
    since_s = (time.monotonic_ns() - since_ns) / 1e9 if entered else 0.0
    return Progress(entered, left, NAMES[name], since_s, page[8 * _NUM_WORDS :].rstrip(b"\0").decode(errors="replace"))


log = CollectiveLog()
"""Of this process: a rank has one life and one communicator in use at a time."""


def keep_in(path: Path) -> None:
    """From here on the log is shared."""
    global log
    log = CollectiveLog(path)
