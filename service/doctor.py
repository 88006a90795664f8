"""What `cplab doctor` looks at: everything that would stop a run, and everything that would spoil its numbers."""

from __future__ import annotations

import os
import shutil
from datetime import UTC, datetime
from pathlib import Path

from experiments.errors import UserError
from service import preflight
from service.environment import environment
from service.nightly.overdue import overdue
from service.preflight import Finding, Level
from service.run.cluster import ADDRESS_ENV_VAR, probe
from service.run.resources import count_gpus
from service.store.home import TRACKING_ENV_VAR, open_home

MIN_FREE_BYTES = 1 << 30
NETWORK_FILE_SYSTEMS = {"nfs", "nfs4", "cifs", "smb3", "fuse.sshfs", "lustre", "beegfs", "9p", "ceph"}


def examine() -> list[Finding]:
    """All findings, in the order that a run would meet them."""
    return [*_versions(), *_devices(), *_cluster(), *_store(), *_nights(), *preflight.neighbours()]


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
    text = f"{env['cores']} cores, {env['cpu']}; {count_gpus()} GPUs"
    few = [Finding(Level.WARNING, "cores", "one core: ranks and their lanes will share it")] if env["cores"] < 2 else []
    return [Finding(Level.OK, "devices", text), *few, *preflight.governor()]


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


def _nights() -> list[Finding]:
    try:
        lines = overdue(open_home(), datetime.now(UTC).date())
    except UserError as error:
        return [Finding(Level.WARNING, "nights", str(error))]
    return [Finding(Level.WARNING, "nights", line) for line in lines]


def _file_system(folder: Path) -> str:
    best, kind = "", ""
    for line in Path("/proc/mounts").read_text().splitlines():
        _, mount, fs, *_ = line.split()
        if str(folder).startswith(mount) and len(mount) > len(best):
            best, kind = mount, fs
    return kind
