"""The real links: pad, all-gather, trim and re-range over a torch.distributed group.

Legend: T rows on this rank, S step tokens, D head dim (or the bytes of a packed key), c ranks.
"""

from __future__ import annotations

import time

import torch

from experiments.names import Lane
from experiments.spec.fabric import FabricSpec
from workers.fabrics.base import GatherMarks
from workers.fabrics.rows import row_moves
from workers.fabrics.transport import CollectiveTransport
from workers.lanes import Lanes
from workers.splits.plan import GatherPlan


class ProcessGroupFabric:
    """See `Fabric`. Buffers belong to the fabric and live as long as it; one pair for each shape."""

    trailer_rows = 0
    """Extra rows that each rank puts behind its keys on the wire."""

    def __init__(self, spec: FabricSpec, transport: CollectiveTransport, lanes: Lanes) -> None:
        self.spec, self.transport, self.lanes = spec, transport, lanes
        self._rows = row_moves(lanes.device)
        self._buffers: dict[tuple[int, int, int, torch.dtype], tuple[torch.Tensor, torch.Tensor]] = {}
        self._sources: dict[int, tuple[GatherPlan, torch.Tensor]] = {}

    @property
    def path(self) -> str:
        return self.transport.path

    def gather(self, plan: GatherPlan, k_TD: torch.Tensor, out_SD: torch.Tensor) -> GatherMarks:
        """See `Fabric.gather`."""
        lanes = self.lanes
        arrival_ns, arrival = time.monotonic_ns(), lanes.mark()
        if not plan.is_split:
            out_SD.copy_(k_TD)
            return GatherMarks(arrival, arrival, arrival, lanes.mark())
        wire_rows = plan.max_rows + self.trailer_rows
        local, everyone = self._buffers_for(wire_rows, plan.cp_size, k_TD)
        self._rows.pad(k_TD.contiguous(), local)
        self.stamp(local, arrival_ns)
        wire = lanes.mark()
        late_us = self.move(plan, local, everyone)
        wire_end = lanes.mark()
        self._rows.reorder(everyone, self._source_rows(plan, wire_rows), out_SD)
        return GatherMarks(arrival, wire, wire_end, lanes.mark(), late_us, self.wire_floor_us(plan, everyone))

    def move(self, plan: GatherPlan, local: torch.Tensor, everyone: torch.Tensor) -> float:
        """The wire: rows of every rank, [R, D], into [c R, D] in rank order; us past a link model's floor."""
        beside_compute = self.lanes.lane is Lane.SIDE
        self.transport.all_gather(everyone.view(torch.uint8).view(-1), local.view(torch.uint8).view(-1), beside_compute)
        return 0.0

    def stamp(self, local: torch.Tensor, arrival_ns: int) -> None:
        """Hook: what the trailer says."""

    def wire_floor_us(self, plan: GatherPlan, everyone: torch.Tensor) -> float | None:
        """Hook: the least time of the wire, where only the lane's own marks tell how far past it the wire ended."""
        return None

    def _buffers_for(self, wire_rows: int, cp_size: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        width = like.shape[1]
        key = (wire_rows, cp_size, width, like.dtype)
        if key not in self._buffers:
            self._buffers[key] = (like.new_zeros(wire_rows, width), like.new_zeros(cp_size * wire_rows, width))
        return self._buffers[key]

    def _source_rows(self, plan: GatherPlan, wire_rows: int) -> torch.Tensor:
        """Made once a plan, on the device that gathers; the plan is kept, so its id stays its own."""
        if id(plan) not in self._sources:
            rows_S = plan.source_rows_S
            if wire_rows != plan.max_rows:
                rows_S = rows_S + rows_S // plan.max_rows * (wire_rows - plan.max_rows)
            self._sources[id(plan)] = (plan, rows_S.to(self.lanes.device))
        return self._sources[id(plan)][1]
