"""Ranks under Ray: one actor in a placement group for each, ordered by where they came to lie. An actor owns its rank and always answers."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from experiments.names import Device
from experiments.spec.placement import PlacementSpec
from service.errors import InfrastructureError
from service.run.cluster import living_nodes
from service.run.placement import bundles_of, rank_order, refuse_other_than_asked
from service.run.rank_group import RankGroup, Whereabouts
from workers.host import RankHost
from workers.messages import Answer, Request
from workers.standing import Standing


class RankOwner:
    """The actor: supervises one rank process on its node."""

    def __init__(self) -> None:
        # Ray starts its workers at nice 15, and a rank inherits it: any neighbour would be timed with it. Root may undo that; elsewhere
        # RAY_worker_niceness=0 at `ray start` does, and the map of ranks says what held.
        with contextlib.suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, 0, 0)
        self._host = RankHost()

    def where(self, interfaces: tuple[str, ...] = ()) -> Whereabouts:
        """`interfaces`: the first of these that the node has; the one of its address when there are none to choose from."""
        import ray

        address = ray.util.get_node_ip_address()
        return Whereabouts(
            node_id=ray.get_runtime_context().get_node_id(),
            hostname=socket.gethostname(),
            address=address,
            interface=_interface_of(address, interfaces),
            cores=len(os.sched_getaffinity(0)),
            pid=os.getpid(),
            niceness=os.getpriority(os.PRIO_PROCESS, 0),
            gpus=tuple(str(gpu) for gpu in ray.get_gpu_ids()),
        )

    def launch(self, import_paths: tuple[str, ...]) -> int:
        return self._host.launch(import_paths)

    def ask(self, request: Request, timeout_s: float) -> Answer:
        return self._host.ask(request, timeout_s)

    def standing(self) -> Standing:
        return self._host.standing()

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

    def standing(self) -> Future[Standing]:
        return self._actor.standing.remote().future()  # type: ignore[no-any-return]

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
        PlacementError: The actors do not lie where `placement` says.
    """
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    num_gpus = placement.gpus_per_rank if device is Device.CUDA else 0
    bundles = bundles_of(cp_size, placement, device)
    reserved = placement_group(
        list(bundles.resources),
        strategy=bundles.strategy,
        bundle_label_selector=[bundles.labels] * len(bundles.ranks) if bundles.labels else None,
    )
    actors: list[Any] = []
    try:
        if not reserved.wait(timeout_s):
            free = ray.available_resources()
            names = {"CPU": placement.cpus_per_rank, **({"GPU": num_gpus} if num_gpus else {})}
            raise InfrastructureError(
                f"the cluster gave no placement for {cp_size} ranks x {' and '.join(f'{each:g} {name}' for name, each in names.items())} "
                f"within {timeout_s:g} s ({', '.join(f'{free.get(name, 0):g} {name}' for name in names)} free)"
            )
        # Several threads: one may wait on the rank while others ask how it stands or end it.
        remote = ray.remote(num_cpus=placement.cpus_per_rank, num_gpus=num_gpus, max_restarts=0, max_concurrency=4)(RankOwner)
        for index in (bundle for bundle, ranks in enumerate(bundles.ranks) for _ in range(ranks)):
            strategy = PlacementGroupSchedulingStrategy(placement_group=reserved, placement_group_bundle_index=index)
            actors.append(remote.options(scheduling_strategy=strategy).remote())
        places = ray.get([actor.where.remote(placement.interfaces) for actor in actors], timeout=timeout_s)
        order = rank_order(places)
        refuse_other_than_asked([places[index] for index in order], living_nodes(ray), placement, device)
    except BaseException as error:
        for actor in actors:
            ray.kill(actor)
        remove_placement_group(reserved)
        if isinstance(error, ray.exceptions.GetTimeoutError):
            raise InfrastructureError(f"{cp_size} rank actors did not come up within {timeout_s:g} s") from None
        if isinstance(error, ray.exceptions.RayError):
            raise InfrastructureError(f"a rank actor did not come up: {' '.join(str(error).split())[:400]}") from None
        raise
    return RayRankGroup([RayRank(actors[index], places[index]) for index in order], reserved)


def _interface_of(address: str, wanted: Sequence[str]) -> str:
    """The first of the wanted interfaces that is here, empty when none is; with none wanted the one that holds this node's address, loopback when
    none says so."""
    import psutil

    present = psutil.net_if_addrs()
    if wanted:
        return next((name for name in wanted if name in present), "")
    return next((str(name) for name, found in present.items() if any(entry.address == address for entry in found)), "lo")
