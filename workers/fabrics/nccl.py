"""NCCL's own word on itself: which version was loaded, and how it moves what it is given."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

from experiments.errors import UserError

SHARES_GPUS_FROM = (2, 30, 0)
"""NCCL before that refuses two ranks of one communicator on a device."""

_CHOICE = re.compile(r"AllGather: (\d+) Bytes -> Algo (\w+) proto (\w+) channel\{Lo\.\.Hi\}=\{(\d+)\.\.(\d+)\}")


def version() -> tuple[int, int, int]:
    """Of the library that is loaded, which torch's own word on the one it was built with does not tell; zeros where there is none."""
    try:
        library, code = ctypes.CDLL("libnccl.so.2"), ctypes.c_int(0)
        library.ncclGetVersion(ctypes.byref(code))
    except (OSError, AttributeError):
        return 0, 0, 0
    return code.value // 10000, code.value // 100 % 100, code.value % 100


def version_words() -> str:
    """As 2.31.2."""
    return ".".join(map(str, version()))


def refuse_unless_it_shares_gpus(num_ranks: int) -> None:
    """
    Raises:
        UserError: The loaded NCCL takes one rank a device.
    """
    if version() < SHARES_GPUS_FROM:
        raise UserError(
            f"{num_ranks} ranks share GPUs, and NCCL {version_words()} takes one rank a GPU: that needs NCCL 2.30 or newer (install a newer "
            "nvidia-nccl package, or name its libnccl.so.2 in LD_PRELOAD where the ranks start)"
        )


@dataclass(frozen=True)
class Choice:
    """How NCCL gathers. Each channel is a CTA."""

    algorithm: str
    protocol: str
    channels: int

    @property
    def words(self) -> str:
        return f"{self.algorithm} {self.protocol} on {self.channels} CTA{'s' * (self.channels != 1)}"


class ChoiceLog:
    """What NCCL writes down of its choices, to a file in memory, so that a killed rank leaves nothing behind. Only a group's rank 0 is told.

    NCCL writes only while it is listened to: with its log on, enqueuing a collective takes it up to twice as long.
    """

    def __init__(self) -> None:
        """It stays empty where somebody else asked for NCCL's log, and with an NCCL that cannot be told to look at its settings again."""
        self._look_again = None if "NCCL_DEBUG" in os.environ else _resetting_function()
        self._file = os.memfd_create("nccl-log")
        self._settings = {
            "NCCL_DEBUG": "INFO",
            "NCCL_DEBUG_SUBSYS": "TUNING",
            "NCCL_DEBUG_FILE": f"/proc/self/fd/{self._file}",
        }

    @contextmanager
    def listening(self) -> Iterator[dict[int, Choice]]:
        """Fills the dict at its end: bytes of a rank -> how all-gathers of that size went in between."""
        found: dict[int, Choice] = {}
        if self._look_again is None:
            yield found
            return
        os.environ.update(self._settings)
        self._look_again()
        try:
            yield found
        finally:
            for name in self._settings:
                del os.environ[name]
            self._look_again()
        found.update(choices_in(os.pread(self._file, os.fstat(self._file).st_size, 0).decode(errors="replace")))


def _resetting_function() -> Callable[[], None] | None:
    """NCCL's own, which is deprecated: a later one may do without."""
    try:
        return cast(Callable[[], None], ctypes.CDLL("libnccl.so.2").ncclResetDebugInit)
    except (OSError, AttributeError):
        return None


def choices_in(text: str) -> dict[int, Choice]:
    """All-gathers by the bytes that each rank brings, of a log with NCCL_DEBUG_SUBSYS=TUNING; the last word on a size counts."""
    return {
        int(size): Choice(algorithm, protocol, int(high) - int(low) + 1)
        for size, algorithm, protocol, low, high in _CHOICE.findall(text)
    }


def words_of(choices: dict[int, Choice]) -> str:
    """Sizes that went alike together; empty without any."""
    sizes: dict[Choice, list[int]] = {}
    for size, choice in sorted(choices.items()):
        sizes.setdefault(choice, []).append(size)
    return ", ".join(
        f"{choice.words} for {of[0]}{f' to {of[-1]}' if len(of) > 1 else ''} B a rank" for choice, of in sizes.items()
    )
