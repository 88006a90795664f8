"""A claim: the driver that writes a sweep, by a lock on a file beside the records. The kernel frees it with its holder, whatever that dies of, so
a sweep that the records call RUNNING is told from one whose driver is gone.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.errors import UserError

_PATIENCE_S = 1.0
"""Who looks at a claim holds it for a moment."""


@contextlib.contextmanager
def claimed(records_path: Path, sweep_id: str) -> Iterator[None]:
    """Holds a sweep for the time of the context; records in memory need no claim.

    Raises:
        UserError: Another driver holds it.
    """
    if str(records_path) == ":memory:":
        yield
        return
    path = _path(records_path, sweep_id)
    path.parent.mkdir(exist_ok=True)
    file = _take(path, sweep_id)
    try:
        os.ftruncate(file, 0)
        os.write(file, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(file)


def claimant(records_path: Path, sweep_id: str) -> dict[str, Any] | None:
    """`pid` and `host` of the living driver of a sweep; None when nobody holds it."""
    try:
        file = os.open(_path(records_path, sweep_id), os.O_RDWR)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _read(file)
    else:
        return None
    finally:
        os.close(file)


def _take(path: Path, sweep_id: str) -> int:
    deadline_s = time.monotonic() + _PATIENCE_S
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A holder that has just left took its file along: a lock on that one keeps nobody out.
            if path.exists() and os.path.samestat(os.fstat(file), path.stat()):
                return file
        except BlockingIOError:
            if time.monotonic() > deadline_s:
                holder = _read(file)
                os.close(file)
                raise UserError(
                    f"SWEEP: {sweep_id} is still running (pid {holder.get('pid')} on {holder.get('host')}): end that run first"
                ) from None
        os.close(file)
        time.sleep(0.05)


def _read(file: int) -> dict[str, Any]:
    try:
        content = json.loads(os.pread(file, 4096, 0))
    except ValueError:  # not written yet
        return {}
    return content if isinstance(content, dict) else {}


def _path(records_path: Path, sweep_id: str) -> Path:
    return records_path.with_name("running") / f"{sweep_id}.lock"
