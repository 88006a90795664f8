"""Filler: GEMMs and memory traffic in place of the attention and the MoE that follow an indexer in a real layer.

It gives the ranks what they have between two gathers in earnest: time to drift apart, busy cores, and caches that hold something else.
"""

from __future__ import annotations

import torch

from experiments.spec.cell import FILLER_BYTES
from workers.lanes import Lanes

CALIBRATION_RUNS = 7


class Filler:
    """A number of equal units, each one GEMM and one copy, that takes the wanted time on this rank when nothing else runs."""

    def __init__(self, wanted_us: float, lanes: Lanes) -> None:
        """Calibrates, which takes some tens of the wanted time."""
        self._lanes, device = lanes, lanes.device
        # A unit of some microseconds on either device: a core's, or a chip's.
        size, slice_floats = (64, 1 << 13) if device.type == "cpu" else (1024, 1 << 18)
        self._left, self._right = torch.randn(2, size, size, device=device)
        self._product = torch.empty(size, size, device=device)
        self._source = torch.zeros(max(1, FILLER_BYTES // 4 // slice_floats), slice_floats, device=device)
        self._target = torch.empty(slice_floats, device=device)
        self._next_slice = 0
        self.units = 16
        # Twice: a unit inside a long run costs less than one in a short run.
        for _ in range(2):
            self.units = max(1, round(self.units * wanted_us / self._measured_us()))

    def run(self) -> None:
        """All units, on the calling lane."""
        for _ in range(self.units):
            torch.mm(self._left, self._right, out=self._product)
            self._target.copy_(self._source[self._next_slice])
            self._next_slice = (self._next_slice + 1) % len(self._source)

    def _measured_us(self) -> float:
        """The fastest of some runs: what stands in the way of the others is not the filler's."""
        times_us = []
        for _ in range(CALIBRATION_RUNS):
            began = self._lanes.mark()
            self.run()
            ended = self._lanes.mark()
            self._lanes.drain()
            times_us.append(self._lanes.us(ended) - self._lanes.us(began))
        return max(min(times_us), 1e-3)
