"""A group of CP ranks as the controller sees it: ask all, wait for all, and on the first that fails end them all.

It knows ranks as handles that give futures: Ray actors (`ray_ranks`) or plain child processes (`local_ranks`), the same code on both.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from concurrent.futures import Future, wait
from dataclasses import asdict, dataclass
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, Protocol

from experiments.names import Device
from service.run.blame import Failure, GroupLostError, culprit, failure_of
from workers.messages import Answer, Joined, JoinGroup, OpenStore, Request, StoreOpen
from workers.standing import Standing

__all__ = ["GroupLostError", "RankGroup", "RankHandle", "Whereabouts"]

REPLY_GRACE_S = 5.0
"""How much longer the controller waits than the rank's own owner: the owner knows the cause, so it should speak first."""


@dataclass(frozen=True)
class Whereabouts:
    """Where a rank's owner runs."""

    node_id: str
    hostname: str
    address: str
    interface: str
    cores: int
    pid: int
    niceness: int
    gpus: tuple[str, ...] = ()
    """Ray's names of the GPUs that it reserved there."""


def gpus_to_see(node: Sequence[Whereabouts], own: Whereabouts) -> tuple[str, ...]:
    """The GPUs of the ranks on a node, a rank's own first. Ray shows a rank its own alone; the driver then takes a peer's memory for its own
    GPU's, and copies into it by a kernel that waits for SMs (seen on two H100s) where a copy engine could."""
    return tuple(dict.fromkeys((*own.gpus, *(gpu for where in node for gpu in where.gpus))))


class RankHandle(Protocol):
    """The owner of one rank. Futures fail with what went wrong."""

    where: Whereabouts

    def launch(self, import_paths: Sequence[str]) -> Future[int]: ...

    def ask(self, request: Request, timeout_s: float) -> Future[Answer]: ...

    def standing(self) -> Future[Standing]: ...

    def kill_rank(self) -> Future[None]: ...

    def kill(self) -> None:
        """Ends the owner too."""
        ...


BLAME_S = 1.0
EVIDENCE_S = 4.0
"""For the owners' answers on how their ranks stand; a dead node's does not come."""
KILL_S = 15.0
"""For owners to end their ranks."""


def _put(done: SimpleQueue[int], rank: int, _: Future[Any]) -> None:
    done.put(rank)


class RankGroup:
    """The live ranks of one cp_size, in rank order. One launch at a time."""

    def __init__(self, handles: Sequence[RankHandle]) -> None:
        self.handles = list(handles)
        self.joined: list[Joined] = []

    @property
    def shares_clock(self) -> bool:
        """Whether arrivals of different ranks can be compared."""
        return len({j.boot_id for j in self.joined}) == 1 and bool(self.joined and self.joined[0].boot_id)

    def rank_map(self) -> list[dict[str, Any]]:
        """rank -> (node, process), as recorded with every launch."""
        return [
            {
                "rank": j.rank,
                "rank_pid": j.pid,
                "rank_cores": list(j.cores),
                "gpu": j.gpu,
                "gpu_uuid": j.gpu_uuid,
                **asdict(h.where),
            }
            for j, h in zip(self.joined, self.handles, strict=True)
        ]

    def launch(self, timeout_s: float, gather_timeout_s: float, device: Device, import_paths: Sequence[str]) -> None:
        """A new set of rank processes, met in a new communicator.

        Raises:
            GroupLostError: One did not come up in `timeout_s`.
        """
        handles = self.handles
        self._collect([h.launch(import_paths) for h in handles], timeout_s, "launch")
        nodes = [h.where.node_id for h in handles]
        is_one_host = len(set(nodes)) == 1
        host = "127.0.0.1" if is_one_host else handles[0].where.address
        opening = handles[0].ask(OpenStore(host, len(handles), timeout_s), timeout_s)
        store = self._collect([opening], timeout_s, "open the rendezvous")[0]
        assert isinstance(store, StoreOpen)
        joins = [
            JoinGroup(
                rank=rank,
                world_size=len(handles),
                store=store,
                interface="lo" if is_one_host else handle.where.interface,
                backend="cpu:gloo,cuda:nccl" if device is Device.CUDA else "gloo",
                timeout_s=gather_timeout_s,
                num_threads=max(1, handle.where.cores // nodes.count(handle.where.node_id)),
                device=device,
                node_index=nodes[:rank].count(handle.where.node_id),
                node_ranks=nodes.count(handle.where.node_id),
                gpus=gpus_to_see([h.where for h in handles if h.where.node_id == handle.where.node_id], handle.where),
            )
            for rank, handle in enumerate(handles)
        ]
        answers = self.ask(joins, timeout_s)
        self.joined = [answer for answer in answers if isinstance(answer, Joined)]

    def ask(self, requests: Sequence[Request] | Request, timeout_s: float) -> list[Answer]:
        """Every rank's answer, in rank order. One request for all, or one for each.

        Raises:
            GroupLostError: A rank failed, died or was late; all rank processes have been ended.
        """
        each = list(requests) if isinstance(requests, Sequence) else [requests] * len(self.handles)
        futures = [handle.ask(request, timeout_s) for handle, request in zip(self.handles, each, strict=True)]
        return self._collect(futures, timeout_s, type(each[0]).__name__)

    def _collect(self, futures: list[Future[Any]], timeout_s: float, doing: str) -> list[Any]:
        deadline_s = time.monotonic() + timeout_s + REPLY_GRACE_S
        done: SimpleQueue[int] = SimpleQueue()
        for rank, future in enumerate(futures):
            future.add_done_callback(partial(_put, done, rank))  # waiting on all for each would be quadratic in ranks
        for _ in futures:
            try:
                rank = done.get(timeout=max(0.0, deadline_s - time.monotonic()))
            except Empty:
                silent = next(rank for rank, future in enumerate(futures) if not future.done())
                self._give_up([Failure(silent, "gave no sign of life in time", is_late=True)], doing)
            if failure_of(rank, futures[rank]) is not None:
                # A rank that dies breaks its peers' gathers, and theirs may be the first word: hear who else fails before blaming one.
                wait(futures, BLAME_S)
                self._give_up([f for f in (failure_of(rank, future) for rank, future in enumerate(futures)) if f], doing)
        return [future.result() for future in futures]

    def _give_up(self, failures: Sequence[Failure], doing: str) -> None:
        standings = self._standings()
        self.kill_ranks({rank for rank, standing in enumerate(standings) if standing is None})
        failure = culprit(failures, standings)
        where, fault = self.handles[failure.rank].where, failure.fault
        arm = f", arm {fault.arm!r}" if fault and fault.arm else ""
        texts = [f"rank {rank}: {'its owner does not answer' if s is None else s.text}" for rank, s in enumerate(standings)]
        evidence = "\n".join([fault.trace, *texts] if fault and fault.trace else texts)
        raise GroupLostError(
            f"rank {failure.rank} on {where.hostname} ({where.address}){arm}: {failure.cause} [{doing}]", evidence, fault
        )

    def _standings(self) -> list[Standing | None]:
        """How every rank stands; None where the owner does not say."""
        futures = [handle.standing() for handle in self.handles]
        wait(futures, EVIDENCE_S)
        return [future.result() if future.done() and future.exception() is None else None for future in futures]

    def kill_ranks(self, silent: Collection[int] = ()) -> None:
        """Ends every rank process; their owners live on. Those known to be silent are told, and not waited for."""
        killed = [handle.kill_rank() for handle in self.handles]
        wait([done for rank, done in enumerate(killed) if rank not in silent], KILL_S)
        self.joined = []

    def close(self) -> None:
        """Ends owners and ranks."""
        for handle in self.handles:
            handle.kill()
        self.joined = []
