"""Fabrics: transport x link model. A fabric alone touches the bytes of a gather. `FABRICS` registers one under every name."""

from __future__ import annotations

from experiments.names import FabricKind
from experiments.spec.fabric import FabricSpec
from workers.fabrics.base import Fabric, GatherMarks, GatherTimes
from workers.fabrics.emulated import EmulatedFabric
from workers.fabrics.one_rank import OneRankFabric
from workers.fabrics.process_group import ProcessGroupFabric
from workers.fabrics.transport import CollectiveTransport
from workers.lanes import Lanes

FABRICS: dict[FabricKind, type[ProcessGroupFabric]] = {
    FabricKind.PROCESS_GROUP: ProcessGroupFabric,
    FabricKind.EMULATED: EmulatedFabric,
    FabricKind.ONE_RANK: OneRankFabric,
}


def make_fabric(spec: FabricSpec, transport: CollectiveTransport, lanes: Lanes) -> ProcessGroupFabric:
    """The fabric of a cell over an open transport."""
    return FABRICS[spec.kind](spec, transport, lanes)


__all__ = ["FABRICS", "Fabric", "GatherMarks", "GatherTimes", "make_fabric"]
