"""Preflight: what could spoil numbers on this machine right now: neighbours that compute, a clock that follows the load."""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

BUSY_SHARE = 0.2


class Level(StrEnum):
    OK = "ok"
    WARNING = "warning"
    STOP = "stop"
    """A run would not start."""


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report."""

    level: Level
    subject: str
    text: str


def noise() -> list[Finding]:
    """What is noted with every sweep before it begins."""
    return [*governor(), *neighbours()]


def governor() -> list[Finding]:
    path = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    if not path.exists():
        return []
    governor = path.read_text().strip()
    level = Level.OK if governor == "performance" else Level.WARNING
    return [Finding(level, "clock", f"scaling governor {governor!r}" + ("" if level is Level.OK else ": clocks follow the load"))]


def neighbours() -> list[Finding]:
    import psutil

    processes = list(psutil.process_iter(["pid", "name"]))
    for process in processes:
        _quietly(process)
    psutil.cpu_percent()
    psutil.cpu_percent(interval=0.5)
    busy = [
        (share, process)
        for process in processes
        if process.pid != os.getpid() and (share := _quietly(process) / 100) > BUSY_SHARE
    ]
    if not busy:
        return [Finding(Level.OK, "neighbours", f"nobody else computes (load {os.getloadavg()[0]:.2f})")]
    listed = ", ".join(
        f"{p.info['name']} (pid {p.pid}, {share:.0%} of a core)" for share, p in sorted(busy, key=lambda b: -b[0])[:5]
    )
    return [Finding(Level.WARNING, "neighbours", f"{listed}: numbers will be noisy")]


def _quietly(process: object) -> float:
    import psutil

    try:
        return float(process.cpu_percent(None))  # type: ignore[attr-defined]
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0.0
