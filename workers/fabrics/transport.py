"""The transport: torch.distributed's all-gather over one process group, and nothing else."""

from __future__ import annotations

import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]


class CollectiveTransport:
    """Moves equal byte buffers between all ranks of a group: gloo for host memory, NCCL for device memory, by the same calls.

    One communicator, used from one lane at a time: two lanes inside one communicator deadlock for good (SGLang #31117).
    """

    def __init__(self, group: dist.ProcessGroup | None, interface: str) -> None:
        self._group = group
        self._interface = interface
        self._moves_device_memory = group is not None and "nccl" in str(dist.get_backend_config(group))
        # torch 2.13 renames the call; 2.11 has only the old name.
        self._all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

    @property
    def path(self) -> str:
        """What really carries the bytes, as recorded with every result."""
        if self._group is None:
            return "none (one rank)"
        ranks = dist.get_world_size(self._group)
        if self._moves_device_memory:
            version = ".".join(map(str, torch.cuda.nccl.version()))
            return f"nccl (built with {version}) over {self._interface} or what links its devices, {ranks} ranks"
        return f"{dist.get_backend(self._group)} over {self._interface}, {ranks} ranks"

    def all_gather(self, out: torch.Tensor, local: torch.Tensor) -> None:
        """uint8 [n] from every rank into uint8 [c * n], in rank order.

        Raises:
            RuntimeError: A rank did not come within the group's timeout, or is gone.
        """
        if self._group is None:
            out.copy_(local)
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            self._all_gather(out, local, group=self._group)

    def all_gather_us(self, time_us: float) -> list[float]:
        """One time of every rank, in rank order."""
        everyone = torch.empty(dist.get_world_size(self._group) if self._group else 1, dtype=torch.float64)
        self.all_gather(everyone.view(torch.uint8), torch.tensor([time_us], dtype=torch.float64).view(torch.uint8))
        return [float(us) for us in everyone]

    def send(self, tensor: torch.Tensor, to: int) -> None:
        """To one rank, which receives."""
        dist.send(tensor, to, group=self._group)

    def receive(self, tensor: torch.Tensor, source: int) -> None:
        """From one rank, which sends."""
        dist.recv(tensor, source, group=self._group)

    def barrier(self) -> None:
        """Of the hosts."""
        if self._group is not None and self._moves_device_memory:
            self.all_gather_us(0.0)  # torch's own barrier would be one of the devices
        elif self._group is not None:
            dist.barrier(group=self._group)

    def align(self, word_1: torch.Tensor) -> None:
        """Holds the current stream until those of all ranks have come here: a sum of one word of device memory."""
        if self._group is not None:
            dist.all_reduce(word_1, group=self._group)


def rendezvous(rank: int, world_size: int, host: str, port: int, timeout_s: float) -> tuple[TCPStore, int]:
    """The store of a group, and its port. Rank 0 binds port 0 (the system picks a free one: no probe-then-bind race)."""
    store = TCPStore(
        host, port, world_size=None, is_master=rank == 0, timeout=timedelta(seconds=timeout_s), wait_for_workers=False
    )
    return store, store.port


def open_group(store: TCPStore, rank: int, world_size: int, backend: str, timeout_s: float) -> dist.ProcessGroup | None:
    """The communicator of all ranks; every collective on it ends within `timeout_s`."""
    if world_size == 1:
        return None
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout_s))
    return dist.group.WORLD
