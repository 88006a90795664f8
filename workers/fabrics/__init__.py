"""Fabrics: transport x link model. A fabric alone touches the bytes of a gather. `FABRICS` registers one under every name."""

from __future__ import annotations

from experiments.names import FabricKind
from experiments.spec.fabric import FabricSpec
from workers.fabrics.base import Fabric, GatherTimes
from workers.fabrics.emulated import EmulatedFabric
from workers.fabrics.process_group import ProcessGroupFabric
from workers.fabrics.transport import CollectiveTransport

FABRICS: dict[FabricKind, type[ProcessGroupFabric]] = {
    FabricKind.PROCESS_GROUP: ProcessGroupFabric,
    FabricKind.EMULATED: EmulatedFabric,
}


def make_fabric(spec: FabricSpec, transport: CollectiveTransport) -> ProcessGroupFabric:
    """The fabric of a cell over an open transport."""
    return FABRICS[spec.kind](spec, transport)


__all__ = ["FABRICS", "Fabric", "GatherTimes", "make_fabric"]
