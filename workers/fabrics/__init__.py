"""Fabrics: transport x link model. A fabric alone touches the bytes of a gather. `FABRICS` registers one under every name."""

from __future__ import annotations

from collections.abc import Iterable

from experiments.names import FabricKind, Transport
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


def by_transport(fabric: Fabric, transports: Iterable[Transport]) -> dict[Transport, Fabric]:
    """The same links by every transport that an arm has, `fabric` itself by its own.

    Raises:
        UserError: A transport does not reach all ranks.
    """
    fabrics = {Transport.COLLECTIVE: fabric}
    if Transport.SYMMETRIC_MEMORY in transports:
        from workers.fabrics.symmetric import SymmetricFabric

        assert isinstance(fabric, ProcessGroupFabric)
        fabrics[Transport.SYMMETRIC_MEMORY] = SymmetricFabric(fabric)
    return fabrics


__all__ = ["FABRICS", "Fabric", "GatherMarks", "GatherTimes", "by_transport", "make_fabric"]
