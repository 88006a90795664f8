"""Room for the records: enough before a run begins, and a name for the failure when it ends during one."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Sequence
from pathlib import Path

from experiments.errors import UserError
from experiments.spec.experiment import ExperimentSpec
from service.errors import InfrastructureError
from service.run.preview import CellPreview
from service.store.home import HOME_ENV_VAR

BYTES_OF_A_TRIAL, BYTES_OF_A_RANK = 160, 110
"""Of a trial's row, and of what it keeps of each rank: nine times of nine characters, and the pages' slack."""
SPARE_BYTES = 8 << 20
"""SQLite's write-ahead log (4 MiB before it is folded in), checks, ranks, stacks."""


class RecordsError(InfrastructureError):
    """The records could not be written: the disk is full, gone or read-only. What was complete before is kept."""


def needed_bytes(spec: ExperimentSpec, previews: Sequence[CellPreview]) -> int:
    """What a sweep's records take at the most, before any of it is published."""
    trials = sum(p.trials * len(p.cell.steps) * (BYTES_OF_A_TRIAL + BYTES_OF_A_RANK * p.cell.num_ranks) for p in previews)
    return trials + SPARE_BYTES


def refuse_without_room(folder: Path, spec: ExperimentSpec, previews: Sequence[CellPreview]) -> None:
    """
    Raises:
        UserError: The disk of CPLAB_HOME cannot hold what the sweep will write.
    """
    needed, free = needed_bytes(spec, previews), shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{HOME_ENV_VAR}: the disk of {str(folder)!r} has {free / 2**20:.1f} MiB free, and the records of {spec.name} may take "
            f"{needed / 2**20:.1f} MiB: free some (`cplab gc`), or set {HOME_ENV_VAR} to another disk"
        )


def records_error(error: sqlite3.Error, path: str) -> RecordsError:
    """How it is said."""
    try:
        free = f"{shutil.disk_usage(os.path.dirname(path) or '.').free / 2**20:.1f} MiB free"
    except OSError as gone:
        free = str(gone.strerror)
    return RecordsError(
        f"the records at {path!r} could not be written: {error} ({free}): what was complete before is kept; mend the disk, then "
        "`cplab run --resume last` goes on"
    )
