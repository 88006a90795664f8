"""Filler: GEMMs and memory traffic in place of the attention and the MoE that follow an indexer in a real layer.

It gives the ranks what they have between two gathers in earnest: time to drift apart, busy cores, and caches that hold something else.
"""

from __future__ import annotations

import time

import torch

from experiments.spec.cell import FILLER_BYTES

GEMM_SIZE = 64
SLICE_FLOATS = 1 << 13
CALIBRATION_RUNS = 7


class Filler:
    """A number of equal units, each one GEMM of 64^3 and one copy of 32 KiB, that takes the wanted time on this rank when nothing else runs."""

    def __init__(self, wanted_us: float) -> None:
        """Calibrates, which takes some tens of the wanted time."""
        self._left, self._right = torch.randn(2, GEMM_SIZE, GEMM_SIZE)
        self._product = torch.empty(GEMM_SIZE, GEMM_SIZE)
        self._source = torch.zeros(FILLER_BYTES // 4 // SLICE_FLOATS, SLICE_FLOATS)
        self._target = torch.empty(SLICE_FLOATS)
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
            began_ns = time.monotonic_ns()
            self.run()
            times_us.append((time.monotonic_ns() - began_ns) / 1e3)
        return max(min(times_us), 1e-3)
