"""What a cluster of this run's own could offer at most: known, and refused, before anything is started."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence

import psutil

from experiments.errors import UserError
from experiments.spec.cell import Cell
from service.run.cluster import ADDRESS_ENV_VAR, Cluster, refuse_if_too_small


def refuse_what_this_machine_cannot_hold(cells: Sequence[Cell], cpus_per_rank: float, num_inputs: int) -> None:
    """What is certain before a cluster of our own is started; nothing to say of a cluster that RAY_ADDRESS names.

    Raises:
        UserError: A cell's ranks need more CPUs, or more memory, than this machine has.
    """
    if os.environ.get(ADDRESS_ENV_VAR):
        return
    cpus = len(os.sched_getaffinity(0))
    machine = Cluster(is_own=True, address="", cpus=cpus, nodes=((socket.gethostname(), cpus),))
    refuse_if_too_small(machine, [cell.cp_size for cell in cells], cpus_per_rank)
    largest = max(cells, key=lambda cell: cell.cp_size * cell.bytes_per_rank(num_inputs))
    each_bytes, all_bytes = largest.bytes_per_rank(num_inputs), psutil.virtual_memory().total
    if largest.cp_size * each_bytes > all_bytes:
        raise UserError(
            f"workload: {largest.cp_size} ranks x {each_bytes / 2**30:.1f} GiB (cell {largest.label}) are more than the "
            f"{all_bytes / 2**30:.1f} GiB of this machine: shorter prompts, a smaller cells.cp_size or smaller dims"
        )
