"""What a fabric does, and what it says about a gather it has done."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from workers.lanes import Lanes, Mark
from workers.splits.plan import GatherPlan


@dataclass(frozen=True)
class GatherTimes:
    """One gather on one rank, in us.

    Attributes:
        gather_us: From local k ready to all S rows in token order: pad, wire, trim, re-range.
        pad_us: The part of it before the wire: the copy into the send buffer.
        wire_us: The wire alone, waiting for late ranks and for the link model included.
        arrival_us: When this rank arrived, on the host's clock.
        late_us: How far past the link model's floor the wire ended; 0 where no model rules. The pace that was held.
    """

    gather_us: float
    pad_us: float
    wire_us: float
    arrival_us: float
    late_us: float


@dataclass(frozen=True)
class GatherMarks:
    """The same on the lane that gathered: to be read once it is drained.

    Attributes:
        arrival, wire, wire_end, done: The begin of the gather, of the wire, of the re-range, and the end.
        late_us: See `GatherTimes`, where the fabric knows it itself.
        floor_us: The least time of the wire, where it does not.
    """

    arrival: Mark
    wire: Mark
    wire_end: Mark
    done: Mark
    late_us: float = 0.0
    floor_us: float | None = None

    def read(self, lanes: Lanes) -> GatherTimes:
        arrival_us, wire_us, wire_end_us, done_us = map(lanes.us, (self.arrival, self.wire, self.wire_end, self.done))
        late_us = self.late_us if self.floor_us is None else wire_end_us - wire_us - self.floor_us
        return GatherTimes(done_us - arrival_us, wire_us - arrival_us, wire_end_us - wire_us, arrival_us, late_us)


class Fabric(Protocol):
    """Gathers the keys of a plan."""

    @property
    def path(self) -> str:
        """Which path really ran."""
        ...

    def gather(self, plan: GatherPlan, k_TD: torch.Tensor, out_SD: torch.Tensor) -> GatherMarks:
        """Rows of every rank, [T, D], into [S, D] in token order, on the calling lane: bf16 keys, or the bytes of another payload."""
        ...
