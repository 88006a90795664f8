"""Ranks under Ray: one actor in a placement group for each, ordered by (node, device). An actor owns its rank and always answers."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from experiments.names import Device
from experiments.spec.measurement import PlacementSpec
from service.errors import InfrastructureError
from service.run.rank_group import RankGroup, Whereabouts
from workers.host import RankHost
from workers.messages import Answer, Request


class RankOwner:
    """The actor: supervises one rank process on its node."""

    def __init__(self) -> None:
        # Ray starts its workers at nice 15, and a rank inherits it: any neighbour would be timed with it. Root may undo that; elsewhere
        # RAY_worker_niceness=0 at `ray start` does, and the map of ranks says what held.
        with contextlib.suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, 0, 0)
        self._host = RankHost()

    def where(self) -> Whereabouts:
        import ray

        address = ray.util.get_node_ip_address()
        return Whereabouts(
            node_id=ray.get_runtime_context().get_node_id(),
            hostname=socket.gethostname(),
            address=address,
            interface=_interface_of(address),
            cores=len(os.sched_getaffinity(0)),
            pid=os.getpid(),
            niceness=os.getpriority(os.PRIO_PROCESS, 0),
        )

    def launch(self, import_paths: tuple[str, ...]) -> int:
        return self._host.launch(import_paths)

    def ask(self, request: Request, timeout_s: float) -> Answer:
        return self._host.ask(request, timeout_s)

    def stack(self) -> str:
        return self._host.stack()

    def kill_rank(self) -> None:
        self._host.kill()


class RayRank:
    """See `RankHandle`."""

    def __init__(self, actor: Any, where: Whereabouts) -> None:
        self._actor, self.where = actor, where

    def launch(self, import_paths: Sequence[str]) -> Future[int]:
        return self._actor.launch.remote(tuple(import_paths)).future()  # type: ignore[no-any-return]

    def ask(self, request: Request, timeout_s: float) -> Future[Answer]:
        return self._actor.ask.remote(request, timeout_s).future()  # type: ignore[no-any-return]

    def stack(self) -> Future[str]:
        return self._actor.stack.remote().future()  # type: ignore[no-any-return]

    def kill_rank(self) -> Future[None]:
        return self._actor.kill_rank.remote().future()  # type: ignore[no-any-return]

    def kill(self) -> None:
        import ray

        ray.kill(self._actor)


class RayRankGroup(RankGroup):
    """A group in a placement group of its own, which goes with it."""

    def __init__(self, handles: Sequence[RayRank], placement_group: Any) -> None:
        super().__init__(handles)
        self._placement_group = placement_group

    def close(self) -> None:
        import ray

        super().close()
        ray.util.remove_placement_group(self._placement_group)


def ray_group(cp_size: int, placement: PlacementSpec, timeout_s: float, device: Device = Device.CPU) -> RayRankGroup:
    """Actors for `cp_size` ranks, up and answering.

    Raises:
        InfrastructureError: The cluster did not give the resources, or an actor did not come up, in `timeout_s`.
    """
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    num_gpus = placement.gpus_per_rank if device is Device.CUDA else 0
    bundles = [{"CPU": placement.cpus_per_rank, **({"GPU": num_gpus} if num_gpus else {})} for _ in range(cp_size)]
    reserved = placement_group(bundles, strategy=placement.strategy)
    actors: list[Any] = []
    try:
        if not reserved.wait(timeout_s):
            free = ray.available_resources()
            names = {"CPU": placement.cpus_per_rank, **({"GPU": num_gpus} if num_gpus else {})}
            raise InfrastructureError(
                f"the cluster gave no placement for {cp_size} ranks x {' and '.join(f'{each:g} {name}' for name, each in names.items())} "
                f"within {timeout_s:g} s ({', '.join(f'{free.get(name, 0):g} {name}' for name in names)} free)"
            )
        # Two threads: one may wait on the rank while the other asks for its stack or ends it.
        remote = ray.remote(num_cpus=placement.cpus_per_rank, num_gpus=num_gpus, max_restarts=0, max_concurrency=4)(RankOwner)
        for index in range(cp_size):
            strategy = PlacementGroupSchedulingStrategy(placement_group=reserved, placement_group_bundle_index=index)
            actors.append(remote.options(scheduling_strategy=strategy).remote())
        places = ray.get([actor.where.remote() for actor in actors], timeout=timeout_s)
    except BaseException as error:
        for actor in actors:
            ray.kill(actor)
        remove_placement_group(reserved)
        if isinstance(error, ray.exceptions.GetTimeoutError):
            raise InfrastructureError(f"{cp_size} rank actors did not come up within {timeout_s:g} s") from None
        if isinstance(error, ray.exceptions.RayError):
            raise InfrastructureError(f"a rank actor did not come up: {' '.join(str(error).split())[:400]}") from None
        raise
    handles = [RayRank(actor, where) for actor, where in zip(actors, places, strict=True)]
    return RayRankGroup(in_rank_order(handles), reserved)


def in_rank_order(handles: Sequence[RayRank]) -> list[RayRank]:
    """Ranks of a node are consecutive: nodes by address, actors of a node in the order of their processes.

    Bundles of a placement group come in no order of nodes (ray#51117): ranks 0 1 2 3 on nodes a b a b would put every
    neighbour across the network.
    """
    return sorted(handles, key=lambda handle: (_address_key(handle.where.address), handle.where.node_id, handle.where.pid))


def _address_key(address: str) -> tuple[int, ...]:
    return tuple(int(part) if part.isdigit() else 0 for part in address.split("."))


def _interface_of(address: str) -> str:
    """The network interface that holds this node's address; loopback when none says so."""
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in addresses):
            return str(name)
    return "lo"
