"""What a result was measured on and with: versions, machine, revision. Stored with every sweep."""

from __future__ import annotations

import hashlib
import os
import platform
import socket
import subprocess
import sys
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
REVISION_ENV_VAR = "CPLAB_REVISION"
_PACKAGES = ("experiments", "workers", "service")
_VERSIONS = ("torch", "ray", "mlflow", "numpy", "pydantic", "scipy")


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def source_digest() -> str:
    """Twelve hex digits over the code that runs: what stands for a revision where there is no git, as in a job."""
    total = hashlib.sha256()
    for package in _PACKAGES:
        for path in sorted((ROOT / package).rglob("*")):
            if path.suffix in (".py", ".yaml"):
                total.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes() + b"\0")
    return total.hexdigest()[:12]


@lru_cache
def revision() -> dict[str, Any]:
    """The code: CPLAB_REVISION, or git's commit with its dirtiness; the source digest always."""
    digest = source_digest()
    stated = os.environ.get(REVISION_ENV_VAR)
    if stated:
        return {"revision": stated, "dirty": None, "source_digest": digest}
    # Only our own repository: a checkout copied into another project must not take that one's commit.
    top = _git("rev-parse", "--show-toplevel")
    commit = _git("rev-parse", "HEAD") if top and Path(top).resolve() == ROOT else None
    if commit is None:
        return {"revision": f"source-{digest}", "dirty": None, "source_digest": digest}
    return {"revision": commit, "dirty": bool(_git("status", "--porcelain")), "source_digest": digest}


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def versions() -> dict[str, str]:
    """Installed versions of what can change a number."""
    found = {"python": platform.python_version()}
    for name in _VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    return found


def environment() -> dict[str, Any]:
    """The driver's machine, code and command, as JSON values."""
    load = os.getloadavg()
    return {
        **revision(),
        "versions": versions(),
        "host": socket.gethostname(),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "load_1min": round(load[0], 2),
        "command": ["cplab", *sys.argv[1:]],
        "in_job": bool(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR")),
    }
