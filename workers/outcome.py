"""What runs leave behind: the bits of `serial`, which are right, and a run's own bits and times.

Legend: T rows on this rank, S step tokens, H heads, D head dim, K top-k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

import torch

from experiments.names import Payload
from workers.fabrics import GatherTimes
from workers.fabrics.exchange import Exchange
from workers.lanes import Mark


@dataclass(frozen=True)
class Correct:
    """What `serial` makes of one (step, input): the digests of the last layer, and every layer's gathered keys for the controls."""

    q: int
    k: int
    keys: dict[Payload, tuple[torch.Tensor, ...]]
    wire: dict[Payload, tuple[torch.Tensor, ...]] = field(default_factory=dict)
    """Of a one_rank fabric: what is on each layer's wire, the rows of all ranks in rank order."""

    @property
    def keys_SD(self) -> tuple[torch.Tensor, ...]:
        return self.keys[Payload.BF16]


@dataclass(frozen=True)
class Selected:
    """Digests of the index keys and of the selections that `serial` makes of one (step, input)."""

    keys: int
    topk: int


@dataclass
class LayersMade:
    """What the last of some layers returned, and what the first that broke its contract left undone."""

    q: torch.Tensor
    k: torch.Tensor
    topk: torch.Tensor | None
    fault: str | None
    fillers: list[tuple[Mark, Mark]]
    """Begin and end of each layer's."""


@dataclass
class Outcome:
    """One run: what came out of its last layer, and when. Times are means over its layers, us.

    `q`, `k`, `topk` are None where the variant or the scope does not produce them. `digests` were taken when the last schedule had returned,
    before the side lane was drained: a gather that nobody waited for shows as poison.
    """

    elapsed_us: float
    start_us: float
    window_us: float
    times: GatherTimes | None
    """None where no gather ran."""
    fault: str | None
    q: torch.Tensor | None = None
    k: torch.Tensor | None = None
    topk: torch.Tensor | None = None
    digests: tuple[int, int] | None = None
    filler_us: float | None = None
    enqueue_us: float | None = None
    """Host time to enqueue a layer; None where the host runs it itself."""


def mean_times(exchanges: Sequence[Exchange]) -> GatherTimes | None:
    """Over the layers of a chain; None where no gather ran."""
    times = [times for exchange in exchanges if (times := exchange.times) is not None]
    if not times:
        return None
    return GatherTimes(**{name: fmean(getattr(t, name) for t in times) for name in vars(times[0])})
