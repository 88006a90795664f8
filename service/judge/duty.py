"""Duty: how much of a sweep's time is inside timed trials, and where the rest goes."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from service.judge.results import CellRecord


@dataclass(frozen=True)
class Duty:
    """Seconds of a sweep.

    Attributes:
        by_action: Wall time of each kind of task, as the driver saw it.
        settled_s: Of the tasks that follow a launch's warm-up in its cells: timed blocks, and the checks after them.
        in_trials_s: Inside trials of timed blocks, from the common start to the end of the slowest rank.
    """

    by_action: Mapping[str, float]
    settled_s: float
    in_trials_s: float

    @property
    def share(self) -> float:
        """Of the time after settling; NaN when there was none."""
        return self.in_trials_s / self.settled_s if self.settled_s else math.nan


def duty(spent: Iterable[tuple[str, float]], cells: Iterable[CellRecord], settled: frozenset[str]) -> Duty:
    """The duty of a sweep from its tasks, (action, seconds) each; `settled` names the actions that come after warming up."""
    by_action: dict[str, float] = defaultdict(float)
    for action, took_s in spent:
        by_action[action] += took_s
    # A chain's trial is recorded as the time of one of its layers.
    in_trials_s = math.fsum(max(t.elapsed_us) * cell.cell.get("layers", 1) for cell in cells for t in cell.trials) / 1e6
    return Duty(dict(by_action), math.fsum(s for action, s in by_action.items() if action in settled), in_trials_s)
