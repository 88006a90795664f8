"""What `cplab doctor` looks at: everything that would stop a run, and everything that would spoil its numbers."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from experiments.errors import UserError
from service.environment import environment
from service.run.cluster import ADDRESS_ENV_VAR, probe
from service.store.home import TRACKING_ENV_VAR, open_home

MIN_FREE_BYTES = 1 << 30
BUSY_SHARE = 0.2
NETWORK_FILE_SYSTEMS = {"nfs", "nfs4", "cifs", "smb3", "fuse.sshfs", "lustre", "beegfs", "9p", "ceph"}


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


def examine() -> list[Finding]:
    """All findings, in the order that a run would meet them."""
    return [*_versions(), *_devices(), *_cluster(), *_store(), *_neighbours()]


def _versions() -> list[Finding]:
    env = environment()
    listed = ", ".join(f"{name} {number}" for name, number in env["versions"].items())
    missing = [name for name, number in env["versions"].items() if number == "missing"]
    dirty = {True: " (dirty)", False: "", None: ""}[env["dirty"]]
    return [
        Finding(Level.STOP if missing else Level.OK, "versions", listed),
        Finding(Level.OK, "revision", f"{env['revision']}{dirty}, source digest {env['source_digest']}"),
    ]


def _devices() -> list[Finding]:
    env = environment()
    gpus = len(list(Path("/proc/driver/nvidia/gpus").glob("*"))) if Path("/proc/driver/nvidia/gpus").exists() else 0
    text = f"{env['cores']} cores, {env['cpu']}; {gpus} GPUs"
    few = [Finding(Level.WARNING, "cores", "one core: ranks and their lanes will share it")] if env["cores"] < 2 else []
    return [Finding(Level.OK, "devices", text), *few, *_governor()]


def _governor() -> list[Finding]:
    path = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    if not path.exists():
        return []
    governor = path.read_text().strip()
    level = Level.OK if governor == "performance" else Level.WARNING
    return [Finding(level, "clock", f"scaling governor {governor!r}" + ("" if level is Level.OK else ": clocks follow the load"))]


def _cluster() -> list[Finding]:
    address = os.environ.get(ADDRESS_ENV_VAR, "")
    if not address:
        return [Finding(Level.OK, "cluster", f"{ADDRESS_ENV_VAR} is not set: a run starts a local cluster of its own")]
    try:
        probe(address)
    except UserError as error:
        return [Finding(Level.STOP, "cluster", str(error))]
    return [Finding(Level.OK, "cluster", f"{ADDRESS_ENV_VAR}={address} answers")]


def _store() -> list[Finding]:
    try:
        home = open_home()
    except UserError as error:
        return [Finding(Level.STOP, "store", str(error))]
    findings = [Finding(Level.OK, "store", f"CPLAB_HOME={home.folder}")]
    free = shutil.disk_usage(home.folder).free
    if free < MIN_FREE_BYTES:
        findings.append(Finding(Level.WARNING, "disk", f"{free / 2**30:.1f} GiB free under {home.folder}"))
    kind = _file_system(home.folder)
    if kind in NETWORK_FILE_SYSTEMS:
        findings.append(
            Finding(
                Level.STOP, "disk", f"{home.folder} is on {kind}: the records need a local disk (SQLite's WAL); set CPLAB_HOME"
            )
        )
    uri = os.environ.get(TRACKING_ENV_VAR)
    findings.append(Finding(Level.OK, "tracking", uri or f"{home.tracking_uri} (embedded)"))
    return findings


def _file_system(folder: Path) -> str:
    best, kind = "", ""
    for line in Path("/proc/mounts").read_text().splitlines():
        _, mount, fs, *_ = line.split()
        if str(folder).startswith(mount) and len(mount) > len(best):
            best, kind = mount, fs
    return kind


def _neighbours() -> list[Finding]:
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
