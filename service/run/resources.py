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
from experiments.spec.placement import PlacementSpec
from service.run.cluster import ADDRESS_ENV_VAR, Cluster, refuse_if_too_small
from service.run.placement import Node, PlacementError


def count_gpus() -> int:
    """NVIDIA devices that a process started here may use; the driver says so without torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    present = len([path for path in Path("/dev").glob("nvidia[0-9]*") if path.name.removeprefix("nvidia").isdigit()])
    return present if visible is None else min(present, len([one for one in visible.split(",") if one.strip()]))


def mps_folder() -> Path:
    """Where an MPS daemon and its clients meet."""
    return Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY") or "/tmp/nvidia-mps")


def refuse_to_share_unready(num_ranks: int, gpus_per_rank: float) -> None:
    """
    Raises:
        UserError: Ranks would share a GPU of this machine, and no CUDA MPS daemon serves it.
    """
    if num_ranks > 1 and gpus_per_rank < 1 and not (mps_folder() / "control").exists():
        raise UserError(
            f"placement.gpus_per_rank {gpus_per_rank:g}: ranks that share a GPU need CUDA MPS, and no daemon is at {mps_folder()}: start "
            "nvidia-cuda-mps-control -d, or set CUDA_MPS_PIPE_DIRECTORY to one's folder, or give each rank a GPU of its own"
        )


def refuse_more_ranks_than_gpus(num_ranks: int, gpus_per_rank: float) -> None:
    """For ranks that this process starts by itself; a cluster's are counted when it is connected.

    Raises:
        UserError: They need more GPUs than this machine has, or could share them only with an MPS daemon that is not there.
    """
    gpus = count_gpus()
    if num_ranks * gpus_per_rank > gpus:
        raise UserError(
            f"device cuda: {num_ranks} ranks x {gpus_per_rank:g} GPU need {num_ranks * gpus_per_rank:g} GPUs, this machine has {gpus}: "
            f"at most {int(gpus / gpus_per_rank)} ranks, or gpus_per_rank below 1 (ranks then share a GPU: for correctness, never for speed)"
        )
    refuse_to_share_unready(num_ranks, gpus_per_rank)


def refuse_what_this_machine_cannot_hold(cells: Sequence[Cell], placement: PlacementSpec, num_inputs: int) -> None:
    """What is certain before a cluster of our own is started; nothing to say of a cluster that RAY_ADDRESS names.

    Raises:
        UserError: A cell's ranks need more CPUs, GPUs or memory than this machine has, or would share a GPU without MPS.
    """
    if os.environ.get(ADDRESS_ENV_VAR):
        return
    cpus = len(os.sched_getaffinity(0))
    gpus = count_gpus() if cells[0].device is Device.CUDA else 0
    if placement.node_labels:
        raise PlacementError(
            f"placement.node_labels: a cluster of this run's own has no labelled nodes: drop the key, or set {ADDRESS_ENV_VAR} to a cluster that has"
        )
    machine = Cluster(True, "", cpus, (Node("", socket.gethostname(), "127.0.0.1", cpus, gpus),), gpus)
    refuse_if_too_small(machine, cells, placement)
    if cells[0].device is Device.CUDA:
        refuse_to_share_unready(max(cell.num_ranks for cell in cells), placement.gpus_per_rank)
    largest = max(cells, key=lambda cell: cell.num_ranks * cell.bytes_per_rank(num_inputs))
    each_bytes, all_bytes = largest.bytes_per_rank(num_inputs), psutil.virtual_memory().total
    if cells[0].device is not Device.CUDA and largest.cp_size * each_bytes > all_bytes:
        raise UserError(
            f"workload: {largest.cp_size} ranks x {each_bytes / 2**30:.1f} GiB (cell {largest.label}) are more than the "
            f"{all_bytes / 2**30:.1f} GiB of this machine: shorter prompts, a smaller cells.cp_size or smaller dims"
        )
