"""One real rank on a GPU: its peers' keys are written into its buffer by a mover, at the pace of a link model.

The rank's own kernels run at full speed beside a mover that takes what the real thing takes: a writer of as many CTAs as a collective's, or a copy
engine. What it cannot know is skew: its peers are always on time. Its name says that it is one rank.

Legend: T rows on this rank, S step tokens, R rows of a rank on the wire, D head dim (or the bytes of a packed key), c ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

import torch

from experiments.names import Mover
from experiments.spec.fabric import FabricSpec
from workers.fabrics.base import Fabric, GatherMarks
from workers.fabrics.process_group import ProcessGroupFabric
from workers.fabrics.transport import CollectiveTransport
from workers.lanes import Lanes
from workers.splits.plan import GatherPlan

LAUNCHES = 32


class OneRankFabric(ProcessGroupFabric):
    """See `Fabric`. Before a gather `bring` says what the peers bring."""

    def __init__(self, spec: FabricSpec, transport: CollectiveTransport, lanes: Lanes) -> None:
        super().__init__(spec, transport, lanes)
        self._wire: torch.Tensor | None = None
        self._began_1 = torch.zeros(1, dtype=torch.int64, device=lanes.device)
        self._pinned: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.launch_us = self._measure_launch_us()
        """What a stream takes for a kernel that does nothing: a link's latency was measured with one in it, so the mover waits that much less."""
        self._movers: dict[Mover, Callable[[GatherPlan, torch.Tensor], None]] = {
            Mover.CTA_WRITER: self._write,
            Mover.HOST_DMA: self._copy_from_host,
        }

    @property
    def path(self) -> str:
        s = self.spec
        by = f"{s.mover} of {s.ctas} CTAs" if s.ctas else f"{s.mover}"
        return f"one real rank ({s.plays}), peers played by {by}, held to {s.link}"

    def bring(self, wire_RD: torch.Tensor) -> None:
        """What is on the wire in the next gather: the rows of all ranks, [c R, D] in rank order. They stay the caller's and must not change."""
        self._wire = wire_RD

    def move(self, plan: GatherPlan, local: torch.Tensor, everyone: torch.Tensor) -> float:
        assert self._wire is not None and self._wire.shape == everyone.shape, "somebody says what the peers bring"
        assert self.spec.mover is not None
        self._movers[self.spec.mover](plan, everyone)
        return 0.0

    def _buffers_for(self, wire_rows: int, cp_size: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The rank pads its rows right into their place, as an all-gather in place does."""
        _, everyone = super()._buffers_for(wire_rows, cp_size, like)
        rank = self.spec.played_rank(cp_size)
        return everyone[rank * wire_rows : (rank + 1) * wire_rows], everyone

    def wire_floor_us(self, plan: GatherPlan, everyone: torch.Tensor) -> float:
        floor_us = self.spec.floor_us(plan.received_bytes(everyone.shape[1] * everyone.element_size()))
        assert floor_us is not None, "a one_rank fabric has a link model"
        return floor_us

    @property
    def _wait_us(self) -> float:
        return max(0.0, (self.spec.latency_us or 0.0) - self.launch_us)

    def _measure_launch_us(self) -> float:
        """The median of some: what the lane's own marks show around a kernel that ends at once, behind a device that is busy."""
        from workers.kernels.clock import sleep_us

        sleep_us(0)
        marks = []
        self.lanes.hold_back(LAUNCHES * 40.0)
        for _ in range(LAUNCHES):
            began = self.lanes.mark()
            sleep_us(0)
            marks.append((began, self.lanes.mark()))
        self.lanes.drain()
        return median(self.lanes.us(ended) - self.lanes.us(began) for began, ended in marks)

    def _write(self, plan: GatherPlan, everyone: torch.Tensor) -> None:
        from workers.kernels.gather import write_paced

        assert self._wire is not None and self.spec.ctas is not None and self.spec.bandwidth_mbps is not None
        write_paced(
            self._wire,
            everyone,
            num_ctas=self.spec.ctas,
            latency_us=self._wait_us,
            gbps=self.spec.bandwidth_mbps / 8e3,
            skip_start=plan.rank * plan.max_rows,
            skip_rows=plan.max_rows,
        )

    def _copy_from_host(self, plan: GatherPlan, everyone: torch.Tensor) -> None:
        """The latency, the copies, which are faster than the model's link, and the rest of its time."""
        from workers.kernels.clock import stamp, wait_until

        assert self._wire is not None
        host = self._on_host(self._wire)
        stamp(self._began_1)
        wait_until(self._began_1, self._wait_us)
        start, stop = plan.rank * plan.max_rows, (plan.rank + 1) * plan.max_rows
        for first, last in ((0, start), (stop, everyone.shape[0])):
            if last > first:
                everyone[first:last].copy_(host[first:last], non_blocking=True)
        wait_until(self._began_1, self.wire_floor_us(plan, everyone) - self.launch_us)

    def _on_host(self, wire: torch.Tensor) -> torch.Tensor:
        """A pinned copy, made once; the original is kept, so its id stays its own."""
        if id(wire) not in self._pinned:
            self._pinned[id(wire)] = (wire, wire.cpu().pin_memory())
        return self._pinned[id(wire)][1]


class PlayedGather:
    """See `Fabric`: one gather of a `OneRankFabric`, for which it is known what the peers bring. `fabric` is that one, or what wraps it."""

    def __init__(self, fabric: Fabric, one_rank: OneRankFabric, wire_RD: torch.Tensor) -> None:
        self._fabric, self._one_rank, self._wire_RD = fabric, one_rank, wire_RD

    @property
    def path(self) -> str:
        return self._fabric.path

    def gather(self, plan: GatherPlan, k_TD: torch.Tensor, out_SD: torch.Tensor) -> GatherMarks:
        """See `Fabric.gather`."""
        self._one_rank.bring(self._wire_RD)
        return self._fabric.gather(plan, k_TD, out_SD)
