"""A group of CP ranks as the controller sees it: ask all, wait for all, and on the first that fails end them all.

It knows ranks as handles that give futures: Ray actors (`ray_ranks`) or plain child processes (`local_ranks`), the same code on both.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from experiments.names import Device
from workers.messages import Answer, Joined, JoinGroup, OpenStore, RankFault, Request, StoreOpen

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


class RankHandle(Protocol):
    """The owner of one rank. Futures fail with what went wrong."""

    where: Whereabouts

    def launch(self, import_paths: Sequence[str]) -> Future[int]: ...

    def ask(self, request: Request, timeout_s: float) -> Future[Answer]: ...

    def stack(self) -> Future[str]: ...

    def kill_rank(self) -> Future[None]: ...

    def kill(self) -> None:
        """Ends the owner too."""
        ...


BLAME_S = 1.0


@dataclass(frozen=True)
class Failure:
    """One rank's failure."""

    rank: int
    cause: str
    fault: RankFault | None = None

    @property
    def blame(self) -> int:
        """The likelier the cause and not the effect, the lower: an arm's own error, a dead rank, then a broken collective."""
        if self.fault is None:
            return 1
        return 0 if self.fault.kind in ("schedule", "user") else 2


def _failure(rank: int, future: Future[Any]) -> Failure | None:
    """How a future failed; None when it did not, or is not done."""
    if not future.done():
        return None
    error = future.exception()
    if error is not None:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        # Ray puts the actor's traceback before the cause.
        return Failure(rank, lines[-1] if lines else type(error).__name__)
    answer = future.result()
    return Failure(rank, answer.message, answer) if isinstance(answer, RankFault) else None


class GroupLostError(Exception):
    """A rank failed, and the group was ended with it. Says which rank, on which node, and why."""

    def __init__(self, message: str, evidence: str = "", fault: RankFault | None = None) -> None:
        super().__init__(message)
        self.evidence = evidence
        self.fault = fault


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
        pending = set(futures)
        while pending:
            done, pending = wait(pending, max(0.0, deadline_s - time.monotonic()), FIRST_COMPLETED)
            if not done:
                silent = Failure(next(r for r, f in enumerate(futures) if f in pending), "gave no sign of life in time")
                self._give_up(silent, doing)
            if any(_failure(0, future) for future in done):
                # A rank that dies breaks its peers' gathers, and theirs may be the first word: hear who else fails before blaming one.
                wait(pending, BLAME_S)
                failures = [f for f in (_failure(rank, future) for rank, future in enumerate(futures)) if f]
                self._give_up(min(failures, key=lambda failure: failure.blame), doing)
        return [future.result() for future in futures]

    def _give_up(self, failure: Failure, doing: str) -> None:
        evidence = self._evidence()
        self.kill_ranks()
        where, fault = self.handles[failure.rank].where, failure.fault
        arm = f", arm {fault.arm!r}" if fault and fault.arm else ""
        if fault and fault.trace:
            evidence = f"{fault.trace}\n{evidence}"
        raise GroupLostError(
            f"rank {failure.rank} on {where.hostname} ({where.address}){arm}: {failure.cause} [{doing}]", evidence, fault
        )

    def _evidence(self) -> str:
        """Stacks of the living ranks: who waits where."""
        stacks = [handle.stack() for handle in self.handles]
        wait(stacks, 3)
        texts = []
        for rank, future in enumerate(stacks):
            if future.done() and future.exception() is None and future.result():
                texts.append(f"rank {rank}:\n{future.result()}")
        return "\n".join(texts)

    def kill_ranks(self) -> None:
        """Ends every rank process; their owners live on."""
        wait([handle.kill_rank() for handle in self.handles], 15)
        self.joined = []

    def close(self) -> None:
        """Ends owners and ranks."""
        for handle in self.handles:
            handle.kill()
        self.joined = []
