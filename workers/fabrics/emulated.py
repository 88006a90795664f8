"""The emulated fabric: the real gather, which ends no earlier than its link model says.

The floor is the LAST rank's arrival + latency + received bytes / bandwidth. Arrivals travel with the keys, as one row behind them, so
every rank knows the last one without a second collective; ranks must share a clock, which those of one host do.
"""

from __future__ import annotations

import time

import torch

from workers.fabrics.process_group import ProcessGroupFabric
from workers.splits.plan import GatherPlan

SPIN_NS = 150_000
"""Sleeping is that imprecise on a stock kernel; the rest of a wait is slept in short slices."""
ARRIVAL_BYTES = 8


class EmulatedFabric(ProcessGroupFabric):
    """See `Fabric`."""

    trailer_rows = 1

    @property
    def path(self) -> str:
        return f"{self.transport.path}, held to {self.spec.name}"

    def stamp(self, local: torch.Tensor, arrival_ns: int) -> None:
        local.view(torch.uint8)[-1, :ARRIVAL_BYTES] = torch.tensor([arrival_ns]).view(torch.uint8)

    def move(self, plan: GatherPlan, local: torch.Tensor, everyone: torch.Tensor) -> float:
        super().move(plan, local, everyone)
        trailers = everyone.view(torch.uint8).view(plan.cp_size, local.shape[0], -1)[:, -1, :ARRIVAL_BYTES]
        arrivals_ns = trailers.contiguous().view(torch.int64)
        floor_us = self.spec.floor_us(plan.received_bytes(everyone.shape[1] * everyone.element_size()))
        assert floor_us is not None
        deadline_ns = int(arrivals_ns.max()) + int(floor_us * 1e3)
        while (left_ns := deadline_ns - time.monotonic_ns()) > 0:
            time.sleep((left_ns - SPIN_NS) / 1e9 if left_ns > 2 * SPIN_NS else 20e-6)
        return (time.monotonic_ns() - deadline_ns) / 1e3
