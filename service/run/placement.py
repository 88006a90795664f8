"""Where ranks are reserved, in which order they count, and whether they came to lie where the experiment says. Pure: others ask Ray."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from experiments.errors import UserError
from experiments.names import Device
from experiments.spec.placement import PlacementSpec
from service.run.rank_group import Whereabouts


class PlacementError(UserError):
    """Ranks do not lie as asked; names what was asked and what was found. Raised before anything is timed."""


@dataclass(frozen=True)
class Node:
    """A living Ray node.

    Attributes:
        cpus, gpus: Ray's, in all.
        labels: Its own and Ray's.
    """

    node_id: str
    hostname: str
    address: str
    cpus: float
    gpus: float = 0.0
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def words(self) -> str:
        return f"{self.hostname} ({self.address}; {self.cpus:g} CPUs" + (f", {self.gpus:g} GPUs)" if self.gpus else ")")


@dataclass(frozen=True)
class Bundles:
    """What a placement group is asked for.

    Attributes:
        resources: Of each bundle.
        ranks: How many ranks each bundle holds.
        strategy: Ray's.
        labels: Ray's label selector of every bundle.
    """

    resources: tuple[dict[str, float], ...]
    ranks: tuple[int, ...]
    strategy: str
    labels: dict[str, str]


def resources_of(num_ranks: int, placement: PlacementSpec, device: Device) -> dict[str, float]:
    """What so many ranks reserve of one node."""
    gpus = num_ranks * placement.gpus_per_rank
    whole = gpus if gpus < 1 else math.ceil(gpus)  # Ray knows parts of one GPU only
    return {"CPU": round(num_ranks * placement.cpus_per_rank, 4), **({"GPU": whole} if device is Device.CUDA else {})}


def bundles_of(num_ranks: int, placement: PlacementSpec, device: Device) -> Bundles:
    """A bundle for each node of a stated topology, since only different bundles are kept apart, and one bundle never lies on two nodes; else a bundle
    for each rank."""
    topology = placement.topology(num_ranks)
    ranks = topology or (1,) * num_ranks
    strategy = "STRICT_SPREAD" if topology else placement.strategy
    return Bundles(tuple(resources_of(each, placement, device) for each in ranks), ranks, strategy, dict(placement.node_labels))


def refuse_unplaceable(nodes: Sequence[Node], sizes: Sequence[int], placement: PlacementSpec, device: Device) -> None:
    """
    Args:
        nodes: The cluster's.
        sizes: Ranks of every group.

    Raises:
        PlacementError: A group cannot lie there as asked, whatever else runs.
    """
    fit = [node for node in nodes if matches(node.labels, placement.node_labels)]
    if not fit:
        values = {key: sorted({node.labels[key] for node in nodes if key in node.labels}) for key in placement.node_labels}
        have = "; ".join(f"{key}: {', '.join(found) or 'on no node'}" for key, found in values.items())
        raise PlacementError(f"placement.node_labels: no node has {_labels(placement.node_labels)}; the cluster has {have}")
    for num_ranks in sorted(set(sizes)):
        topology = _exact_topology(num_ranks, placement)
        if topology is None:
            continue
        need = resources_of(topology[0], placement, device)
        enough = [node for node in fit if node.cpus >= need["CPU"] and node.gpus >= need.get("GPU", 0)]
        if len(enough) < len(topology):
            each = " and ".join(f"{amount:g} {name}{'s' * (amount != 1)}" for name, amount in need.items())
            with_labels = f" and {_labels(placement.node_labels)}" if placement.node_labels else ""
            raise PlacementError(
                f"placement.{_asked_by(placement)}: {_shape(topology)}: needs {each} on each{with_labels}; {len(enough)} of the cluster's "
                f"{len(nodes)} nodes will do: {', '.join(node.words for node in nodes)}"
            )


def rank_order(places: Sequence[Whereabouts]) -> list[int]:
    """Which of the places is rank 0, 1, ...: ranks of a node are consecutive, nodes by address, on a node by GPU and then process.

    Bundles of a placement group come in no order of nodes (ray#51117): ranks 0 1 2 3 on nodes a b a b would put every
    neighbour across the network.
    """

    def key(index: int) -> tuple[tuple[int, ...], str, tuple[tuple[int, str], ...], int]:
        where = places[index]
        gpus = tuple((int(gpu) if gpu.isdecimal() else 0, gpu) for gpu in where.gpus)
        return _address_key(where.address), where.node_id, gpus, where.pid

    return sorted(range(len(places)), key=key)


def refuse_other_than_asked(
    places: Sequence[Whereabouts], nodes: Sequence[Node], placement: PlacementSpec, device: Device
) -> None:
    """
    Args:
        places: Where the ranks really are.
        nodes: The cluster's.

    Raises:
        PlacementError: That is not what was asked.
    """
    found = ", ".join(f"{count} on {name} ({address})" for (name, address), count in _counts(places).items())
    counts, topology = sorted(_counts(places).values()), _exact_topology(len(places), placement)
    if topology is not None and counts != sorted(topology):
        raise PlacementError(
            f"placement.{_asked_by(placement)}: asked for {_shape(topology)}, and the ranks came to lie: {found}"
        )
    labels = {node.node_id: node.labels for node in nodes}
    for where in places:
        if not matches(labels.get(where.node_id, {}), placement.node_labels):
            raise PlacementError(
                f"placement.node_labels: asked for nodes with {_labels(placement.node_labels)}, and a rank came to lie on {where.hostname} "
                f"({where.address}), which has {_labels({key: labels.get(where.node_id, {}).get(key, '-') for key in placement.node_labels})}"
            )
        if placement.interfaces and where.interface not in placement.interfaces:
            raise PlacementError(
                f"placement.interfaces: asked for {' or '.join(placement.interfaces)}, and {where.hostname} ({where.address}) has none of "
                "them: name one that it has (`ip link` there), or drop the key"
            )
    if device is Device.CUDA and placement.gpus_per_rank == 1:
        shared = [at for at, count in Counter((w.hostname, gpu) for w in places for gpu in w.gpus).items() if count > 1]
        if shared or not all(where.gpus for where in places):
            what = ", ".join(f"GPU {gpu} of {host}" for host, gpu in shared) or "no GPU"
            raise PlacementError(f"placement.gpus_per_rank: asked for a GPU for each rank, and ranks share {what}: {found}")


def matches(labels: Mapping[str, str], selector: Mapping[str, str]) -> bool:
    """Whether a node's labels are what Ray's label selector asks for."""
    for key, wanted in selector.items():
        parts = re.fullmatch(r"(!?)(?:in\((.*)\)|(.*))", wanted)
        assert parts is not None
        values = parts[2].split(",") if parts[2] is not None else [parts[3]]
        if (labels.get(key) in values) == bool(parts[1]):
            return False
    return True


def _counts(places: Sequence[Whereabouts]) -> dict[tuple[str, str], int]:
    """(host, address) -> ranks there, in the order of the nodes."""
    by_node = Counter(where.node_id for where in places)
    names = {where.node_id: (where.hostname, where.address) for where in places}
    return {names[node]: by_node[node] for node in sorted(by_node, key=lambda node: (_address_key(names[node][1]), node))}


def _exact_topology(num_ranks: int, placement: PlacementSpec) -> tuple[int, ...] | None:
    """Ranks of every node where no other map will do: a stated topology, or a strict strategy's; else None."""
    strict = {"STRICT_PACK": (num_ranks,), "STRICT_SPREAD": (1,) * num_ranks}
    return placement.topology(num_ranks) or strict.get(placement.strategy)


def _asked_by(placement: PlacementSpec) -> str:
    for key in ("ranks_per_node", "nodes"):
        if (value := getattr(placement, key)) is not None:
            return f"{key} {value}"
    return f"strategy {placement.strategy}"


def _shape(topology: Sequence[int]) -> str:
    ranks = f"{topology[0]} rank{'s' * (topology[0] != 1)}"
    return f"{ranks} inside one node" if len(topology) == 1 else f"{ranks} on each of {len(topology)} nodes"


def _labels(labels: Mapping[str, str]) -> str:
    return ", ".join(f"{key}={value}" for key, value in labels.items())


def _address_key(address: str) -> tuple[int, ...]:
    return tuple(int(part) if part.isdigit() else 0 for part in address.split("."))
