"""The dashboard as a process, for tests and benchmarks."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from service.store.home import HOME_ENV_VAR, TRACKING_ENV_VAR, Home

ROOT = Path(__file__).resolve().parents[2]
SCREEN = {"width": 1600, "height": 1000}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def served(home: Home) -> Iterator[list[str]]:
    """`cplab dashboard`; the links that it prints."""
    environment = {**os.environ, HOME_ENV_VAR: str(home.folder), "PYTHONPATH": str(ROOT)}
    environment.pop(TRACKING_ENV_VAR, None)
    command = [sys.executable, "-m", "service", "dashboard", "--port", str(free_port())]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    links: list[str] = []
    try:
        for line in process.stdout:
            if found := re.search(r"http://\S+", line):
                links.append(found.group())
            if "Ctrl-C" in line:
                break
        yield links
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        process.stdout.close()


def chromium() -> str | None:
    """The browser on PATH."""
    return next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
