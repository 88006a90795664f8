"""What a fabric does, and what it says about a gather it has done."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

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


class Fabric(Protocol):
    """Gathers the keys of a plan."""

    @property
    def path(self) -> str:
        """Which path really ran."""
        ...

    def gather(self, plan: GatherPlan, k_TD: torch.Tensor, out_SD: torch.Tensor) -> GatherTimes:
        """bf16 [T, D] of every rank into bf16 [S, D] in token order, on the calling lane."""
        ...
