"""The fabric of the simulated device: no key moves; a gather takes the planted time from the last rank's arrival on the virtual clock."""

from __future__ import annotations

import torch

from experiments.spec.simulation import SimulationSpec
from workers.fabrics.base import GatherMarks
from workers.fabrics.transport import CollectiveTransport
from workers.lanes.simulated import SimulatedLanes
from workers.splits.plan import GatherPlan


class SimulatedFabric:
    """See `Fabric`. Ranks tell each other when they arrive, so that a late one holds up the others as it would in earnest."""

    path = "simulated"

    def __init__(self, simulation: SimulationSpec, lanes: SimulatedLanes, transport: CollectiveTransport) -> None:
        self._gather_us, self._lanes, self._transport = simulation.gather_us, lanes, transport

    def gather(self, plan: GatherPlan, k_TD: torch.Tensor, out_SD: torch.Tensor) -> GatherMarks:
        """See `Fabric.gather`."""
        arrival_us = self._lanes.mark()
        self._lanes.pass_until(max(self._transport.all_gather_us(arrival_us)) + self._gather_us)
        return GatherMarks(arrival_us, arrival_us, self._lanes.mark(), self._lanes.mark())
