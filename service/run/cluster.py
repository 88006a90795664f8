"""The Ray cluster of a run: the one RAY_ADDRESS names, or one of our own that ends with us. Token authentication either way."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.errors import UserError
from experiments.names import Device
from experiments.spec.cell import Cell
from experiments.spec.placement import PlacementSpec
from service.run.placement import Node, refuse_unplaceable
from service.store.home import HOME_ENV_VAR, is_explicit

ADDRESS_ENV_VAR = "RAY_ADDRESS"
PROBE_TIMEOUT_S = 5.0
_PACKAGES = ("experiments", "workers", "service")


@dataclass(frozen=True)
class Cluster:
    """A connected cluster.

    Attributes:
        is_own: Ours: it came with this run and goes with it.
        address: What RAY_ADDRESS said; empty for our own.
        cpus: Ray CPUs that it has in all.
        nodes: The living ones.
        gpus: Ray GPUs that it has in all.
    """

    is_own: bool
    address: str
    cpus: float
    nodes: tuple[Node, ...]
    gpus: float = 0.0

    @property
    def words(self) -> str:
        """The first line that a run prints."""
        what = "a local cluster of this run's own" if self.is_own else f"the cluster at {self.address} ({ADDRESS_ENV_VAR})"
        hosts = ", ".join(node.hostname for node in self.nodes)
        return f"Ray: {what}: {len(self.nodes)} node{'s' * (len(self.nodes) != 1)} ({hosts}), {self.cpus:g} CPUs" + (
            f", {self.gpus:g} GPUs" if self.gpus else ""
        )


@contextlib.contextmanager
def connect() -> Iterator[Cluster]:
    """Connects for the time of a run. A cluster of our own has the cores that this process may use.

    Raises:
        UserError: RAY_ADDRESS cannot be reached, the token is missing or wrong, or a remote driver has no explicit CPLAB_HOME.
    """
    address = os.environ.get(ADDRESS_ENV_VAR, "")
    # Authentication always, decided here and not by what earlier runs left in the home folder.
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if not address:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        os.environ["RAY_WORKER_NICENESS"] = "0"  # Ray's workers yield to every other process by default: nice 15
    elif address.startswith("ray://"):
        raise UserError(
            f"{ADDRESS_ENV_VAR}: {address!r}: Ray Client is not supported; submit the run with `ray job submit` instead"
        )
    else:
        probe(address)

    import ray

    try:
        if address:
            ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False, runtime_env=_runtime_env())
        else:
            ray.init(
                address="local",
                num_cpus=len(os.sched_getaffinity(0)),  # Ray counts the machine's, whatever of it this process may use
                include_dashboard=False,
                logging_level=logging.ERROR,
                log_to_driver=False,
                object_store_memory=100 * 1024 * 1024,
                _node_ip_address="127.0.0.1",
            )
    except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        first_line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        token = "; is the token in ~/.ray/auth_token this cluster's?" if address and "oken" not in first_line else ""
        raise UserError(
            f"{ADDRESS_ENV_VAR}: {address or 'local'!r} cannot be reached: {first_line.strip()[:300]}{token}"
        ) from None
    try:
        yield _describe(ray, address)
    finally:
        ray.shutdown()


def probe(address: str) -> None:
    """
    Raises:
        UserError: Nothing answers at a host:port address.
    """
    if address in ("auto", "local"):
        return
    host, _, port = address.removeprefix("http://").rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"{ADDRESS_ENV_VAR}: {address!r} is no address; give host:port, as in 127.0.0.1:6379, or unset it")
    try:
        with socket.create_connection((host, int(port)), PROBE_TIMEOUT_S):
            return
    except (OSError, OverflowError) as error:
        raise UserError(
            f"{ADDRESS_ENV_VAR}: nothing answers at {address!r} ({error}); start the cluster, or unset {ADDRESS_ENV_VAR} to use one of this run's own"
        ) from None


def _runtime_env() -> dict[str, Any] | None:
    """A job's working directory reaches the workers by itself; a driver of another kind brings our packages along."""
    if os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"):
        return None
    root = Path(__file__).resolve().parents[2]
    return {"py_modules": [str(root / package) for package in _PACKAGES]}


def _describe(ray: Any, address: str) -> Cluster:
    if address and not is_explicit():
        here = ray.get_runtime_context().get_node_id()
        alive = [node for node in ray.nodes() if node["Alive"]]
        head = next((node["NodeID"] for node in alive if "node:__internal_head__" in node["Resources"]), here)
        if here != head:
            raise UserError(
                f"{HOME_ENV_VAR}: this driver does not run on the head node: say where its records go by setting {HOME_ENV_VAR}"
            )
    nodes = living_nodes(ray)
    return Cluster(not address, address, sum(node.cpus for node in nodes), nodes, sum(node.gpus for node in nodes))


def living_nodes(ray: Any) -> tuple[Node, ...]:
    """Of the connected cluster."""
    return tuple(
        Node(
            node_id=str(node["NodeID"]),
            hostname=str(node["NodeManagerHostname"]),
            address=str(node["NodeManagerAddress"]),
            cpus=float(node["Resources"].get("CPU", 0)),
            gpus=float(node["Resources"].get("GPU", 0)),
            labels=dict(node.get("Labels", {})),
        )
        for node in ray.nodes()
        if node["Alive"]
    )


def refuse_if_too_small(cluster: Cluster, cells: Sequence[Cell], placement: PlacementSpec) -> None:
    """
    Raises:
        UserError: The cell with most ranks does not fit, or one not where it is asked to lie, whatever else runs.
    """
    ranks, cpus_per_rank, gpus_per_rank = max(cell.num_ranks for cell in cells), placement.cpus_per_rank, placement.gpus_per_rank
    if cells[0].device is Device.CUDA and ranks * gpus_per_rank > cluster.gpus:
        sharing = (
            "; or placement.gpus_per_rank below 1 (ranks then share a GPU: for correctness, never for speed)"
            if cluster.gpus
            else ""
        )
        raise UserError(
            f"device cuda: {ranks} ranks x {gpus_per_rank:g} GPU need {ranks * gpus_per_rank:g} GPUs, the cluster has {cluster.gpus:g}: "
            f"at most {int(cluster.gpus / gpus_per_rank)} ranks, or a one_rank fabric, which needs one{sharing}"
        )
    needed = ranks * cpus_per_rank
    if needed > cluster.cpus:
        fits = int(cluster.cpus / cpus_per_rank)
        raise UserError(
            f"cells.cp_size: {ranks} ranks x {cpus_per_rank:g} CPU need {needed:g} CPUs, the cluster has {cluster.cpus:g}: "
            f"at most cp_size {fits}, or a smaller placement.cpus_per_rank (ranks then share cores)"
        )
    refuse_unplaceable(cluster.nodes, [cell.num_ranks for cell in cells], placement, cells[0].device)
