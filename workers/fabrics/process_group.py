"""The real links: pad, all-gather, trim and re-range over a torch.distributed group.

Legend: T rows on this rank, S step tokens, D head dim, c ranks.
"""

from __future__ import annotations

import time

import torch

from experiments.spec.fabric import FabricSpec
from workers.fabrics.base import GatherTimes
from workers.fabrics.transport import CollectiveTransport
from workers.splits.plan import GatherPlan


class ProcessGroupFabric:
    """See `Fabric`. Buffers belong to the fabric and live as long as it; one pair for each shape."""

    trailer_rows = 0
    """Extra rows that each rank puts behind its keys on the wire."""

    def __init__(self, spec: FabricSpec, transport: CollectiveTransport) -> None:
        self.spec = spec
        self.transport = transport
        self.delay_us = 0.0
        """Test hook of the verification: waits that long before the wire, so that a missing wait cannot pass by luck."""
        self._buffers: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def path(self) -> str:
        return self.transport.path

    def gather(self, plan: GatherPlan, k_TD: torch.Tensor, out_SD: torch.Tensor) -> GatherTimes:
        """See `Fabric.gather`."""
        arrival_ns = time.monotonic_ns()
        if self.delay_us:
            time.sleep(self.delay_us / 1e6)
        if not plan.is_split:
            out_SD.copy_(k_TD)
            done_ns = time.monotonic_ns()
            return GatherTimes((done_ns - arrival_ns) / 1e3, 0.0, 0.0, arrival_ns / 1e3, 0.0)
        wire_rows = plan.max_rows + self.trailer_rows
        local, everyone = self._buffers_for(wire_rows, plan.cp_size, k_TD)
        rows = k_TD.shape[0]
        local[:rows] = k_TD
        local[rows:] = 0
        self.stamp(local, arrival_ns)
        wire_ns = time.monotonic_ns()
        self.transport.all_gather(everyone.view(torch.uint8).view(-1), local.view(torch.uint8).view(-1))
        late_us = self.hold_pace(plan, everyone, wire_rows)
        wire_end_ns = time.monotonic_ns()
        torch.index_select(everyone, 0, self._source_rows(plan, wire_rows), out=out_SD)
        done_ns = time.monotonic_ns()
        return GatherTimes(
            gather_us=(done_ns - arrival_ns) / 1e3,
            pad_us=(wire_ns - arrival_ns) / 1e3,
            wire_us=(wire_end_ns - wire_ns) / 1e3,
            arrival_us=arrival_ns / 1e3,
            late_us=late_us,
        )

    def stamp(self, local: torch.Tensor, arrival_ns: int) -> None:
        """Hook: what the trailer says."""

    def hold_pace(self, plan: GatherPlan, everyone: torch.Tensor, wire_rows: int) -> float:
        """Hook: waits as a link model demands; us past its floor."""
        return 0.0

    def _buffers_for(self, wire_rows: int, cp_size: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        key = (wire_rows, cp_size)
        if key not in self._buffers:
            width = like.shape[1]
            self._buffers[key] = (like.new_zeros(wire_rows, width), like.new_zeros(cp_size * wire_rows, width))
        return self._buffers[key]

    def _source_rows(self, plan: GatherPlan, wire_rows: int) -> torch.Tensor:
        if wire_rows == plan.max_rows:
            return plan.source_rows_S
        return plan.source_rows_S + plan.source_rows_S // plan.max_rows * (wire_rows - plan.max_rows)
