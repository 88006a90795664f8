"""The head of the cluster, watched from the driver: Ray ends a process that has lost it after a minute, without a word and with exit code 1."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator

from service.errors import ExitCode
from service.exits import complain

PERIOD_S = 3.0
LOST_AFTER_S = 15.0
"""A control store that is restarted at once is no loss; Ray waits for a minute."""
LAST_WORD_S = 15.0
"""From the loss being told to the end of a process that is stuck in a call to Ray."""


@contextlib.contextmanager
def watched_head(address: str, lost: Callable[[str], None]) -> Iterator[None]:
    """For the time of the context: whether anything still answers at the control store's address. When it does not for LOST_AFTER_S, `lost` is
    called with the words, the main thread is ended by SIGTERM, and the process with it when that does not help."""
    over = threading.Event()
    thread = threading.Thread(target=_watch, args=(address, lost, over), name="head-watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()


def _watch(address: str, lost: Callable[[str], None], over: threading.Event) -> None:
    seen_s = time.monotonic()
    while not over.wait(PERIOD_S):
        if _answers(address):
            seen_s = time.monotonic()
        elif (silent_s := time.monotonic() - seen_s) > LOST_AFTER_S:
            words = f"the head of the cluster ({address}) does not answer for {silent_s:.0f} s: it, or the way to it, is gone"
            with contextlib.suppress(Exception):  # whatever ails the records, the process ends
                lost(words)
            complain("failed", f"{words}; what was complete is kept: start it again, then `cplab run --resume last`")
            os.kill(os.getpid(), signal.SIGTERM)
            if not over.wait(LAST_WORD_S):
                os._exit(ExitCode.INFRASTRUCTURE)
            return


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), PERIOD_S):
            return True
    except OSError:
        return False
