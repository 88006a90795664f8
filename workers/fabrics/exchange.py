"""What a schedule sees of the fabric in one trial: `gather` on the main lane, `start_gather` on the side lane.

It owns the trial's destination, which is poisoned beforehand, and it plays the controls of the accounting: the same schedule text runs
with the real gather, with none, or with the events alone.

Legend: T rows on this rank, S step tokens, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from experiments.names import Control
from workers.fabrics.base import Fabric, GatherMarks, GatherTimes
from workers.lanes import Join, Lanes, Mark
from workers.splits.plan import GatherPlan

POISON_BITS = 0x7FC1
"""A bf16 NaN: a row that was never written can not equal a key, nor pass a comparison."""
POISON_BYTE = 0x7F
"""e4m3fn's NaN; as a scale in fp32 it is one no key has."""
HEAD_DIM = 128
"""Of every DSA indexer, and the only one that specs allow."""


class ScheduleError(Exception):
    """A schedule that does not do what a schedule must: one gather of the rank's keys, joined before it returns."""


class Gathering:
    """A gather in flight on the side lane."""

    def __init__(self, exchange: Exchange, join: Join | None, keys: torch.Tensor, local_TD: torch.Tensor) -> None:
        self._exchange, self._join = exchange, join
        self.keys = keys
        """The destination, [S, D]. Nothing in it may be read before `join`."""
        self._local_TD: torch.Tensor | None = local_TD
        """Held until the join: on a GPU its memory would go to the main lane's next tensor while the side lane still reads it."""

    def enqueue(self) -> None:
        """Hands over the gather of a `fork_gather` here; nothing to do for one that runs already."""
        if self._join is not None:
            self._join.enqueue()

    def join(self) -> torch.Tensor:
        """Waits on the main lane, then gives all S rows in token order."""
        self.enqueue()
        self._exchange.joined()
        if self._join is not None:
            self._join.join()
        self._local_TD = None
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
        pack: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        """`correct_SD`: what PREFILLED and ZERO_BYTE return, the gathered keys of this trial's inputs. `pack`: what the payload makes of bf16 keys
        [T, D] before the wire; on the lane of the gather."""
        assert (correct_SD is not None) == (control in (Control.PREFILLED, Control.ZERO_BYTE))
        self._fabric, self._lanes, self._plan, self._out_SD = fabric, lanes, plan, out_SD
        self._control, self._correct_SD, self._pack = control, correct_SD, pack
        self._num_gathers = self._num_forks = self._num_joins = 0
        self._launch: Mark = None
        self._join: Mark = None
        self.marks: GatherMarks | None = None

    def gather(self, k_TD: torch.Tensor) -> torch.Tensor:
        """All S rows in token order, on the main lane: bf16 [T, D] to [S, D] of the payload."""
        self._check(k_TD)
        if self._correct_SD is not None:
            return self._correct_SD
        return self._lanes.stage("gather", self._move, k_TD)

    def start_gather(self, k_TD: torch.Tensor) -> Gathering:
        """The same on the side lane, after everything that the main lane has done so far, and ahead of what it does next."""
        return self._fork(k_TD, is_deferred=False)

    def fork_gather(self, k_TD: torch.Tensor) -> Gathering:
        """The same launch point. Where a host enqueues ahead of its device, the gather is enqueued at `Gathering.enqueue` or the join, behind
        what the schedule does in between; elsewhere it starts at once."""
        return self._fork(k_TD, is_deferred=True)

    def _fork(self, k_TD: torch.Tensor, is_deferred: bool) -> Gathering:
        self._check(k_TD)
        self._num_forks += 1
        if self._control is Control.PREFILLED:
            assert self._correct_SD is not None
            gathering = Gathering(self, None, self._correct_SD, k_TD)
        elif self._control is Control.ZERO_BYTE:
            assert self._correct_SD is not None
            gathering = Gathering(self, self._lanes.fork(lambda: None, is_deferred), self._correct_SD, k_TD)
        else:
            join = self._lanes.fork(lambda: self._lanes.stage("gather", self._move, k_TD), is_deferred)
            gathering = Gathering(self, join, self._out_SD, k_TD)
        self._launch = self._lanes.mark()
        return gathering

    def joined(self) -> None:
        """A schedule has come to the join of its gather."""
        self._num_joins += 1
        self._join = self._lanes.mark()

    @property
    def window_us(self) -> float:
        """Main-lane time from the launch point to the join; 0 for a gather on the main lane. To be read before the lanes meet again."""
        return self._lanes.us(self._join) - self._lanes.us(self._launch) if self._num_joins else 0.0

    @property
    def times(self) -> GatherTimes | None:
        """None where no gather ran. To be read once the lanes are drained, before they meet again."""
        return self.marks.read(self._lanes) if self.marks is not None else None

    def fault(self) -> str | None:
        """What the schedule left undone, once it has returned."""
        if self._num_gathers != 1:
            return f"gathered {self._num_gathers} times instead of once"
        if self._num_joins != self._num_forks:
            return "returned without joining its gather"
        return None

    def _move(self, k_TD: torch.Tensor) -> torch.Tensor:
        rows = k_TD if self._pack is None else self._pack(k_TD)
        self.marks = self._fabric.gather(self._plan, rows, self._out_SD)
        return self._out_SD

    def _check(self, k_TD: torch.Tensor) -> None:
        expected = (self._plan.local_tokens, HEAD_DIM)
        if not isinstance(k_TD, torch.Tensor) or tuple(k_TD.shape) != expected or k_TD.dtype != torch.bfloat16:
            got = f"{k_TD.dtype} {list(k_TD.shape)}" if isinstance(k_TD, torch.Tensor) else type(k_TD).__name__
            raise ScheduleError(f"gathers {got}; the rank's keys are {torch.bfloat16} {list(expected)}")
        self._num_gathers += 1


def poison(out_SD: torch.Tensor) -> None:
    """Fills a destination with NaNs that no key has: bf16's, or in bytes e4m3fn's."""
    if out_SD.dtype == torch.uint8:
        out_SD.fill_(POISON_BYTE)
    else:
        out_SD.view(torch.int16).fill_(POISON_BITS)
