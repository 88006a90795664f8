"""A noisy neighbour: a process that loads one core in bursts while it is held."""

from __future__ import annotations

import multiprocessing
import random
import time
from types import TracebackType

MEAN_BURST_S = 0.3
MEAN_PAUSE_S = 0.3
"""Bursts and pauses are exponential: half of the time on the average, and never in step with anything that is measured."""


class Neighbour:
    """A context: the process lives as long as it."""

    def __init__(self, seed: int = 0, mean_pause_s: float = MEAN_PAUSE_S) -> None:
        """`mean_pause_s`: 0 for a core that is never left alone."""
        target, args = _burst_forever, (seed, mean_pause_s)
        self._process = multiprocessing.get_context("spawn").Process(target=target, args=args, daemon=True)

    def __enter__(self) -> Neighbour:
        self._process.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.kill()
        self._process.join()


def _burst_forever(seed: int, mean_pause_s: float) -> None:
    rng = random.Random(seed)
    while True:
        end_s = time.monotonic() + rng.expovariate(1 / MEAN_BURST_S)
        while time.monotonic() < end_s:
            pass
        time.sleep(mean_pause_s * rng.expovariate(1))
