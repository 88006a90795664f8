"""What a cluster of this run's own could offer at most: known, and refused, before anything is started."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from pathlib import Path

import psutil

from experiments.errors import UserError
from experiments.names import Device
from experiments.spec.cell import Cell
from experiments.spec.measurement import PlacementSpec
from service.run.cluster import ADDRESS_ENV_VAR, Cluster, refuse_if_too_small


def count_gpus() -> int:
    """NVIDIA devices that a process started here may use; the driver says so without torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    present = len([path for path in Path("/dev").glob("nvidia[0-9]*") if path.name.removeprefix("nvidia").isdigit()])
    return present if visible is None else min(present, len([one for one in visible.split(",") if one.strip()]))


def refuse_what_this_machine_cannot_hold(cells: Sequence[Cell], placement: PlacementSpec, num_inputs: int) -> None:
    """What is certain before a cluster of our own is started; nothing to say of a cluster that RAY_ADDRESS names.

    Raises:
        UserError: A cell's ranks need more CPUs, or more memory, than this machine has.
    """
    if os.environ.get(ADDRESS_ENV_VAR):
        return
    cpus = len(os.sched_getaffinity(0))
    machine = Cluster(True, "", cpus, ((socket.gethostname(), cpus),), count_gpus() if cells[0].device is Device.CUDA else 0)
    refuse_if_too_small(machine, cells, placement)
    largest = max(cells, key=lambda cell: cell.num_ranks * cell.bytes_per_rank(num_inputs))
    each_bytes, all_bytes = largest.bytes_per_rank(num_inputs), psutil.virtual_memory().total
    if cells[0].device is not Device.CUDA and largest.cp_size * each_bytes > all_bytes:
        raise UserError(
            f"workload: {largest.cp_size} ranks x {each_bytes / 2**30:.1f} GiB (cell {largest.label}) are more than the "
            f"{all_bytes / 2**30:.1f} GiB of this machine: shorter prompts, a smaller cells.cp_size or smaller dims"
        )
