"""The GPUs of a group's ranks: who has which, found out at the store before a communicator is opened; and what it takes to share one."""

from __future__ import annotations

import ctypes
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed import Store  # type: ignore[attr-defined]

from experiments.errors import UserError
from workers.fabrics import nccl

MPS_ENABLED = 133
"""CU_DEVICE_ATTRIBUTE_MPS_ENABLED of the CUDA driver API."""
MPS_NOT_READY = (805, 807)
"""CUDA_ERROR_MPS_CONNECTION_FAILED and CUDA_ERROR_MPS_SERVER_NOT_READY."""
SHARED_MAX_CTAS = 2
"""Of each rank's collectives where several share a GPU: all of them must be on it at once, beside whatever computes."""


@dataclass(frozen=True)
class GpuMap:
    """Of every rank, in rank order: its GPU's UUID and the boot of its host, which stands for the host."""

    uuids: tuple[str, ...]
    boots: tuple[str, ...]

    @property
    def is_shared(self) -> bool:
        return len(set(self.uuids)) < len(self.uuids)

    @property
    def is_one_host(self) -> bool:
        return len(set(self.boots)) == 1

    @property
    def words(self) -> str:
        ranks, gpus, hosts = (len(set(of)) for of in (range(len(self.uuids)), self.uuids, self.boots))
        on = f"{ranks} ranks {'sharing' if self.is_shared else 'on'} {gpus} GPU{'s' * (gpus != 1)}"
        return f"{on} of {hosts} hosts" if hosts > 1 else on


def meet_gpus(store: Store, rank: int, world_size: int) -> GpuMap:
    """Every rank says what it has, and hears of all: a collective of hosts, through the group's store."""
    store.set(f"gpu/{rank}", f"{boot_id()} {gpu_uuid()}")
    boots, uuids = zip(*(store.get(f"gpu/{peer}").decode().split(" ") for peer in range(world_size)), strict=True)
    return GpuMap(uuids, boots)


def gpu_uuid() -> str:
    """Of the current CUDA device."""
    return str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)


def boot_id() -> str:
    """Of the running host; empty where it does not tell."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else ""


def make_ready(gpus: GpuMap) -> None:
    """The environment of a communicator over those GPUs, before it is opened.

    Raises:
        UserError: Ranks share a GPU, and its CUDA MPS daemon or an NCCL that can do that is missing.
    """
    # A communicator that ends its process, or lets a stuck kernel go, after a time-out would leave a wrong name or wrong keys behind: here the
    # lanes give up, and the rank's owner ends it.
    for name in ("ASYNC_ERROR_HANDLING", "ENABLE_MONITORING", "DUMP_ON_TIMEOUT"):
        os.environ[f"TORCH_NCCL_{name}"] = "0"
    # torch tells devices apart by their index, and a rank that sees one GPU alone calls it 0. It costs multicast, which no copy here uses.
    os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    if not gpus.is_shared:
        return
    nccl.refuse_unless_it_shares_gpus(len(gpus.uuids))
    if not is_under_mps():
        raise UserError(
            f"{gpus.words}, and CUDA MPS is not on: kernels that wait for each other would take turns on the GPU, and hang: start it before "
            "anything uses the GPU (nvidia-cuda-mps-control -d), or give each rank a GPU of its own (placement.gpus_per_rank 1)"
        )
    os.environ["NCCL_MULTI_RANK_GPU_ENABLE"] = "1"
    os.environ["NCCL_NVLS_ENABLE"] = "0"


def wait_for_mps(timeout_s: float) -> None:
    """Until the driver takes this process. An MPS server that lost a client at work takes no new ones until its other clients are gone too: the
    ranks of the launch before, which may still be on their way out. To be called before anything else asks for the GPU."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return
    deadline_s = time.monotonic() + timeout_s
    while driver.cuInit(0) in MPS_NOT_READY and time.monotonic() < deadline_s:
        time.sleep(0.1)


def is_under_mps() -> bool:
    """Whether this process's work on its current device goes through an MPS daemon."""
    driver, value, device = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(0), ctypes.c_int(0)
    index = torch.cuda.current_device()
    return bool(
        driver.cuInit(0) == 0
        and driver.cuDeviceGet(ctypes.byref(device), index) == 0
        and driver.cuDeviceGetAttribute(ctypes.byref(value), MPS_ENABLED, device) == 0
        and value.value
    )
