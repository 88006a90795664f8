"""Does a copy into a peer GPU's memory need SMs? Only where the copying process does not see the peer's GPU. On a host with two GPUs.

    python -m tests.benchmarks.bench_peer_copies

Two ranks with symmetric memory. Rank 0 copies into rank 1's, once with its GPU idle and once while a kernel that holds every SM runs for 2 ms: a copy
engine does not mind, a kernel waits. It sees its own GPU alone (as Ray shows it), its own and then its peer's, or all. Beside it what is known to
need SMs (a copy inside the GPU) and what is known to need none (a copy from pinned host memory).
"""

from __future__ import annotations

import os
import socket
import sys
import time

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from workers.fabrics.transport import rendezvous
from workers.kernels import nvrtc

HELD_US = 2000.0
WAVES = 8
REPEATS = 4
SIZES = (1 << 18, 1 << 21, 1 << 23)
SEES = {"its own alone": ("0", "1"), "its own first": ("0,1", "1,0"), "all": ("0,1", "0,1")}
"""CUDA_VISIBLE_DEVICES of both ranks."""


HOLD = """
extern "C" __global__ void hold(long long nanoseconds) {
    long long began, now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(began));
    do { asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now)); } while (now - began < nanoseconds);
}
"""
holder = nvrtc.Kernel("hold", HOLD, (), threads=128, shared_bytes=200 * 1024, parameters=("q",))
"""One block fills an SM's shared memory; blocks that are still to come keep a later kernel's from the SMs."""


def copy_us(source: torch.Tensor, target: torch.Tensor, is_held: bool) -> float:
    """GPU time of one copy, or of its wait and itself; the last of some."""
    beside, copier = torch.cuda.Stream(), torch.cuda.Stream()
    for _ in range(REPEATS):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if is_held:
            with torch.cuda.stream(beside):
                holder.launch(target.device, WAVES * nvrtc.count_sms(target.device.index), int(HELD_US * 1e3 / WAVES))
            time.sleep(HELD_US / 10e6)  # the kernel is on the GPU, and has the most of its time before it
        with torch.cuda.stream(copier):
            began.record()
            target.copy_(source)
            ended.record()
        torch.cuda.synchronize()
    return float(began.elapsed_time(ended)) * 1e3


def work(rank: int, port: int, sees: str) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = SEES[sees][rank]
    os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    import torch.distributed._symmetric_memory as symmetric_memory

    torch.cuda.set_device(rank if sees == "all" else 0)
    store, _ = rendezvous(rank, 2, "127.0.0.1", port, 30)
    dist.init_process_group("cpu:gloo,cuda:nccl", store=store, rank=rank, world_size=2)
    group = dist.group.WORLD
    assert group is not None
    window = symmetric_memory.empty((SIZES[-1],), dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    at_peer = symmetric_memory.rendezvous(window, group).get_buffer(1 - rank, (SIZES[-1],), window.dtype)
    mine = torch.ones_like(window)
    kinds = {
        "into the peer's memory": (mine, at_peer),
        "inside the GPU": (mine, window),
        "from the host": (torch.ones(SIZES[-1], dtype=torch.uint8, pin_memory=True), window),
    }
    if rank == 0:
        for kind, (source, target) in kinds.items():
            for size in SIZES:
                idle, held = (copy_us(source[:size], target[:size], is_held) for is_held in (False, True))
                print(f"| {sees} | {kind} | {size >> 10} | {idle:.0f} | {held:.0f} |", flush=True)
    dist.barrier(device_ids=[torch.cuda.current_device()])
    dist.destroy_process_group()


def main() -> None:
    if torch.cuda.device_count() < 2:
        sys.exit("needs two GPUs")
    print(f"{torch.cuda.get_device_name()}: a copy, µs; with all SMs held for {HELD_US:g} µs")
    print("| rank sees | copy | KiB | GPU idle | SMs held |\n| --- | --- | --- | --- | --- |", flush=True)
    for sees in SEES:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        spawn(work, (port, sees), nprocs=2)


if __name__ == "__main__":
    main()
