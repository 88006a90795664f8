"""The GPUs of a group's ranks: who has which, found out at the store before a communicator is opened; and what it takes to share one."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed import Store  # type: ignore[attr-defined]

from experiments.errors import UserError
from experiments.spec.cell import Cell
from workers.fabrics import nccl

MPS_ENABLED = 133
"""CU_DEVICE_ATTRIBUTE_MPS_ENABLED of the CUDA driver API."""
PROBE_PAUSE_S = 0.2
_PROBE = """
import ctypes
driver, device, context = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(), ctypes.c_void_p()
failed = (
    driver.cuInit(0)
    or driver.cuDeviceGet(ctypes.byref(device), 0)
    or driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
)
raise SystemExit(bool(failed))
"""
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


def take_gpu(gpus: tuple[str, ...], node_index: int) -> None:
    """Makes one GPU this process's current one: the first of `gpus`, which are to be all it sees, or its share of those it sees already. To be
    called before anything else in the process asks CUDA for its devices.

    Raises:
        UserError: There is none that torch can use.
    """
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    if not torch.cuda.is_available():
        raise UserError("device cuda: this rank's node has no CUDA device that torch can use")
    torch.cuda.set_device(0 if gpus else node_index % torch.cuda.device_count())


def refuse_what_this_gpu_cannot_hold(cell: Cell, num_inputs: int) -> None:
    """
    Raises:
        UserError: The cell's tensors of one rank alone are more than the current device's memory.
    """
    needed_bytes, all_bytes = cell.bytes_per_rank(num_inputs), torch.cuda.mem_get_info()[1]
    if needed_bytes > all_bytes:
        raise UserError(
            f"workload: a rank of cell {cell.label} needs about {needed_bytes / 2**30:.0f} GiB, and its {torch.cuda.get_device_name()} has "
            f"{all_bytes / 2**30:.0f} GiB: shorter prompts, a larger cells.cp_size or smaller dims"
        )


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
    # lanes give up, and the rank's owner ends it. Nor may its watchdog abort a rank whose GPU reports an error: under MPS all ranks on a GPU get it
    # when one of them is killed, and that one is to be named.
    for name in ("ASYNC_ERROR_HANDLING", "ENABLE_MONITORING", "DUMP_ON_TIMEOUT", "RETHROW_CUDA_ERRORS"):
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
    """Until a process is given a context on the GPU, where a CUDA MPS daemon serves it. A server that lost a client at work refuses all until
    its others are gone: the ranks of the launch before, which may still be on their way out. To be called before anything else asks for the
    GPU; what else is wrong with it, torch says."""
    folder = Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY") or "/tmp/nvidia-mps")
    deadline_s = time.monotonic() + timeout_s
    while (folder / "control").exists() and (left_s := deadline_s - time.monotonic()) > 0 and not _gives_contexts(left_s):
        time.sleep(PROBE_PAUSE_S)


def _gives_contexts(timeout_s: float) -> bool:
    """Asked by a process of its own, so that nothing of an attempt that failed stays in the rank."""
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    probe = [sys.executable, "-I", "-S", "-c", _PROBE]
    try:
        return not subprocess.run(probe, env=environment, stderr=subprocess.DEVNULL, timeout=timeout_s, check=False).returncode
    except subprocess.TimeoutExpired:
        return False


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
