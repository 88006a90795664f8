"""The transport: torch.distributed's all-gather over one process group, and nothing else."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from workers import collective_log
from workers.event_loop import EventLoop
from workers.fabrics.gpus import SHARED_MAX_CTAS, GpuMap, make_ready, meet_gpus
from workers.fabrics.nccl import Choice, ChoiceLog, version_words, words_of

MAX_LEARNED = 8
"""Sizes of gathers that NCCL is asked about; of a replay with more, the smallest ones."""


class CollectiveTransport:
    """Moves equal byte buffers between all ranks of a group: gloo for host memory, NCCL for device memory, by the same calls.

    One communicator, used from one lane at a time: two lanes inside one communicator deadlock for good (SGLang #31117).
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        interface: str,
        gpus: GpuMap | None = None,
        log: ChoiceLog | None = None,
        timeout_s: float = 30.0,
    ) -> None:
        """`gpus`: of ranks on CUDA devices. `log`: NCCL's, of this process. `timeout_s`: of the group's collectives."""
        self.group, self.gpus, self.event_loop = group, gpus, EventLoop()
        self._interface, self._log, self._timeout_s = interface, log, timeout_s
        self._moves_device_memory = group is not None and "nccl" in str(dist.get_backend_config(group))
        # torch 2.13 renames the call; 2.11 has only the old name.
        self._all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        self._num_ctas: int | None = None
        self._limited: dict[int, CollectiveTransport] = {}
        self._sizes: list[int] = []
        self._learned: dict[int, Choice | None] = {}

    @property
    def path(self) -> str:
        """What really carries the bytes, as recorded with every result."""
        if self.group is None:
            return "none (one rank)"
        ranks = dist.get_world_size(self.group)
        if not self._moves_device_memory:
            return f"{dist.get_backend(self.group)} over {self._interface}, {ranks} ranks"
        return f"nccl {version_words()}{self._how}, {self._where}"

    @property
    def _how(self) -> str:
        limit = f", held to {self._num_ctas} CTAs" if self._num_ctas else ""
        known = {size: choice for size in self._sizes if (choice := self._learned[size]) is not None}
        return f"{limit} ({words_of(known)})" if known else limit

    @property
    def _where(self) -> str:
        if self.gpus is None:
            return f"{dist.get_world_size(self.group)} ranks"
        return (
            self.gpus.words
            if self.gpus.is_one_host
            else f"{self.gpus.words}, hosts over {self._interface} or what links their devices"
        )

    def limited_to(self, num_ctas: int | None) -> CollectiveTransport:
        """The same group's ranks over a communicator of its own, whose collectives have that many CTAs; this one for None. A collective when it is
        asked for the first time."""
        if num_ctas is None or self.group is None or not self._moves_device_memory:
            return self
        if num_ctas not in self._limited:
            backend, timeout = str(dist.get_backend_config(self.group)), timedelta(seconds=self._timeout_s)
            group = dist.new_group(backend=backend, timeout=timeout, pg_options=_ctas(num_ctas, num_ctas, timeout))
            self._limited[num_ctas] = CollectiveTransport(group, self._interface, self.gpus, self._log, self._timeout_s)
            self._limited[num_ctas]._num_ctas = num_ctas
        return self._limited[num_ctas]

    def learn(self, sizes: Iterable[int]) -> None:
        """Gathers device memory once in each of these sizes, bytes a rank, so that NCCL has its connections and says how it goes about them: what
        `path` tells from now on. A collective; nothing to do for host memory."""
        if not self._moves_device_memory or self._log is None:
            return
        self._sizes = sorted(set(sizes))[:MAX_LEARNED]
        new = [size for size in self._sizes if size not in self._learned]
        with self._log.listening() as choices:
            for size in new:
                local = torch.zeros(size, dtype=torch.uint8, device="cuda")
                self.all_gather(local.new_empty(size * dist.get_world_size(self.group)), local)
            torch.cuda.synchronize()
        self._learned.update({size: choices.get(size) for size in new})

    def all_gather(self, out: torch.Tensor, local: torch.Tensor, beside_compute: bool = False) -> None:
        """uint8 [n] from every rank into uint8 [c * n], in rank order. `beside_compute`: while another thread of the rank computes.

        Raises:
            RuntimeError: A rank did not come within the group's timeout, or is gone.
        """
        if self.group is None:
            out.copy_(local)
            return
        collective_log.log.enter("all_gather")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            if beside_compute and self.event_loop:
                # torch's sender, woken by this call, has mostly run by the time it returns, and so holds no lock that a prompt loop would spin on.
                work = self._all_gather(out, local, group=self.group, async_op=True)
                with self.event_loop.prompt():
                    work.wait()
            else:
                self._all_gather(out, local, group=self.group)
        collective_log.log.leave()

    def all_gather_us(self, time_us: float) -> list[float]:
        """One time of every rank, in rank order."""
        everyone = torch.empty(dist.get_world_size(self.group) if self.group else 1, dtype=torch.float64)
        self.all_gather(everyone.view(torch.uint8), torch.tensor([time_us], dtype=torch.float64).view(torch.uint8))
        return [float(us) for us in everyone]

    def send(self, tensor: torch.Tensor, to: int) -> None:
        """To one rank, which receives."""
        dist.send(tensor, to, group=self.group)

    def receive(self, tensor: torch.Tensor, source: int) -> None:
        """From one rank, which sends."""
        dist.recv(tensor, source, group=self.group)

    def barrier(self) -> None:
        """Of the hosts."""
        if self.group is not None and self._moves_device_memory:
            self.all_gather_us(0.0)  # torch's own barrier would be one of the devices
        elif self.group is not None:
            collective_log.log.enter("barrier")
            dist.barrier(group=self.group)
            collective_log.log.leave()

    def align(self, word_1: torch.Tensor) -> None:
        """Holds the current stream until those of all ranks have come here: a sum of one word of device memory."""
        if self.group is not None:
            collective_log.log.enter("align")
            dist.all_reduce(word_1, group=self.group)
            collective_log.log.leave()


def rendezvous(rank: int, world_size: int, host: str, port: int, timeout_s: float) -> tuple[TCPStore, int]:
    """The store of a group, and its port. Rank 0 binds port 0 (the system picks a free one: no probe-then-bind race)."""
    store = TCPStore(
        host, port, world_size=None, is_master=rank == 0, timeout=timedelta(seconds=timeout_s), wait_for_workers=False
    )
    return store, store.port


def open_transport(
    store: TCPStore, rank: int, world_size: int, backend: str, interface: str, timeout_s: float
) -> CollectiveTransport:
    """A transport between all ranks; every collective of it ends within `timeout_s`. On CUDA the rank's device must be the current one.

    Raises:
        UserError: Ranks share a GPU where they cannot.
    """
    if world_size == 1:
        return CollectiveTransport(None, interface)
    gpus, log, options, timeout = None, None, None, timedelta(seconds=timeout_s)
    if "nccl" in backend:
        gpus, log = meet_gpus(store, rank, world_size), ChoiceLog()
        make_ready(gpus)
        # Not by NCCL_MAX_CTAS, which would overrule a cell's own number.
        options = _ctas(None, SHARED_MAX_CTAS, timeout) if gpus.is_shared else None
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout, pg_options=options)
    return CollectiveTransport(dist.group.WORLD, interface, gpus, log, timeout_s)


def _ctas(least: int | None, most: int, timeout: timedelta) -> Any:
    """Options of an NCCL communicator whose collectives have that many."""
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout  # torch warns of any other
    if least is not None:
        options.config.min_ctas = least
    options.config.max_ctas = most
    return options
