"""The fabric of the simulated device: nothing moves; its time is a stage of the simulated lanes."""

from __future__ import annotations

import torch

from experiments.spec.simulation import SimulationSpec
from workers.fabrics.base import GatherTimes
from workers.splits.plan import GatherPlan


class SimulatedFabric:
    """See `Fabric`. The lanes have already spent the planted gather_us when this is called."""

    path = "simulated"

    def __init__(self, simulation: SimulationSpec) -> None:
        self._gather_us = simulation.gather_us

    def gather(self, plan: GatherPlan, k_TD: torch.Tensor, out_SD: torch.Tensor) -> GatherTimes:
        """See `Fabric.gather`."""
        return GatherTimes(gather_us=self._gather_us, pad_us=0.0, wire_us=self._gather_us, arrival_us=0.0, late_us=0.0)
