"""What a schedule sees of the fabric in one trial: `gather` on the main lane, `start_gather` on the side lane.

It owns the trial's destination, which is poisoned beforehand, and it plays the controls of the accounting: the same schedule text runs
with the real gather, with none, or with the events alone.

Legend: T rows on this rank, S step tokens, D head dim.
"""

from __future__ import annotations

import torch

from experiments.names import Control
from workers.fabrics.base import Fabric, GatherTimes
from workers.lanes import Join, Lanes
from workers.splits.plan import GatherPlan

POISON_BITS = 0x7FC1
"""A bf16 NaN: a row that was never written can not equal a key, nor pass a comparison."""


class ScheduleError(Exception):
    """A schedule that does not do what a schedule must: one gather of the rank's keys, joined before it returns."""


class Gathering:
    """A gather in flight on the side lane."""

    def __init__(self, exchange: Exchange, join: Join | None, keys: torch.Tensor) -> None:
        self._exchange, self._join = exchange, join
        self.keys = keys
        """The destination, bf16 [S, D]. Nothing in it may be read before `join`."""

    def join(self) -> torch.Tensor:
        """Waits on the main lane, then gives all S rows in token order."""
        self._exchange.joined()
        if self._join is not None:
            self._join.join()
        return self.keys


class Exchange:
    """One trial's gather of one plan."""

    def __init__(
        self,
        fabric: Fabric,
        lanes: Lanes,
        plan: GatherPlan,
        out_SD: torch.Tensor,
        control: Control,
        correct_SD: torch.Tensor | None,
    ) -> None:
        """`correct_SD`: what PREFILLED and ZERO_BYTE return, the gathered keys of this trial's inputs."""
        assert (correct_SD is not None) == (control in (Control.PREFILLED, Control.ZERO_BYTE))
        self._fabric, self._lanes, self._plan, self._out_SD = fabric, lanes, plan, out_SD
        self._control, self._correct_SD = control, correct_SD
        self._num_gathers = self._num_forks = self._num_joins = 0
        self._launch_us = self._join_us = 0.0
        self.times: GatherTimes | None = None

    def gather(self, k_TD: torch.Tensor) -> torch.Tensor:
        """All S rows in token order, on the main lane: bf16 [T, D] to bf16 [S, D]."""
        self._check(k_TD)
        if self._correct_SD is not None:
            return self._correct_SD
        return self._lanes.stage("gather", self._move, k_TD)

    def start_gather(self, k_TD: torch.Tensor) -> Gathering:
        """The same on the side lane, after everything that the main lane has done so far."""
        self._check(k_TD)
        self._num_forks += 1
        if self._control is Control.PREFILLED:
            assert self._correct_SD is not None
            gathering = Gathering(self, None, self._correct_SD)
        elif self._control is Control.ZERO_BYTE:
            assert self._correct_SD is not None
            gathering = Gathering(self, self._lanes.fork(lambda: None), self._correct_SD)
        else:
            join = self._lanes.fork(lambda: self._lanes.stage("gather", self._move, k_TD))
            gathering = Gathering(self, join, self._out_SD)
        self._launch_us = self._lanes.now_us()
        return gathering

    def joined(self) -> None:
        """A schedule has come to the join of its gather."""
        self._num_joins += 1
        self._join_us = self._lanes.now_us()

    @property
    def window_us(self) -> float:
        """Main-lane time from the launch point to the join; 0 for a gather on the main lane."""
        return self._join_us - self._launch_us if self._num_joins else 0.0

    def fault(self) -> str | None:
        """What the schedule left undone, once it has returned."""
        if self._num_gathers != 1:
            return f"gathered {self._num_gathers} times instead of once"
        if self._num_joins != self._num_forks:
            return "returned without joining its gather"
        return None

    def _move(self, k_TD: torch.Tensor) -> torch.Tensor:
        self.times = self._fabric.gather(self._plan, k_TD, self._out_SD)
        return self._out_SD

    def _check(self, k_TD: torch.Tensor) -> None:
        expected = (self._plan.local_tokens, self._out_SD.shape[1])
        if not isinstance(k_TD, torch.Tensor) or tuple(k_TD.shape) != expected or k_TD.dtype != self._out_SD.dtype:
            got = f"{k_TD.dtype} {list(k_TD.shape)}" if isinstance(k_TD, torch.Tensor) else type(k_TD).__name__
            raise ScheduleError(f"gathers {got}; the rank's keys are {self._out_SD.dtype} {list(expected)}")
        self._num_gathers += 1


def poison(out_SD: torch.Tensor) -> None:
    """Fills a bf16 destination with NaN bits that no key has."""
    out_SD.view(torch.int16).fill_(POISON_BITS)
