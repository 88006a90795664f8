"""The gather by copy engines: each rank copies its rows into its peers' memory, on the lane of the gather, and a barrier says they are there.

Each rank has two receive buffers of a shape and takes them in turn, so one barrier a gather is enough. A rank that passes the barrier of a gather
knows that its peers have come to it, hence have read whatever they gathered before it: the other buffer may be overwritten. Trials begin with all
ranks idle, so it matters nothing which buffer a trial begins with, nor that a CUDA graph always takes the same ones.

Legend: R rows of a rank on the wire, D head dim (or the bytes of a packed key), c ranks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed._symmetric_memory as symmetric_memory

from experiments.errors import UserError
from workers.fabrics.gpus import GpuMap
from workers.fabrics.process_group import ProcessGroupFabric
from workers.splits.plan import GatherPlan

TURNS = 2


class Window(NamedTuple):
    """One receive buffer of this rank, and this rank's place in its peers'."""

    everyone_ND: torch.Tensor
    """[c R, D] in rank order."""
    mine_RD: torch.Tensor
    """This rank's rows in it: padded right into their place."""
    at_peers: tuple[torch.Tensor, ...]
    """[R, D] of each peer's, the next rank's first: no two ranks begin with the same one."""


class Shape:
    """The windows of a shape, and whose turn it is."""

    def __init__(self, handle: Any, windows: tuple[Window, ...]) -> None:
        self.handle, self._windows, self._turn = handle, windows, 0

    @property
    def window(self) -> Window:
        return self._windows[self._turn]

    def turn(self) -> None:
        self._turn = (self._turn + 1) % TURNS


class SymmetricFabric(ProcessGroupFabric):
    """See `Fabric`: the links of another fabric, by copies into its ranks' memory."""

    def __init__(self, beside: ProcessGroupFabric) -> None:
        """`beside`: of the same ranks, by collectives.

        Raises:
            UserError: Ranks on several hosts have no memory in common.
        """
        super().__init__(beside.spec, beside.transport, beside.lanes)
        self._shapes: dict[tuple[int, int, torch.dtype], Shape] = {}
        self._shape: Shape | None = None
        gpus = self.transport.gpus
        if gpus is not None and not gpus.is_one_host:
            raise UserError(
                f"transport symmetric_memory: {gpus.words}, and copies reach the GPUs of one host only: use the collective"
            )

    @property
    def path(self) -> str:
        if self.transport.group is None:
            return self.transport.path
        gpus = self.transport.gpus
        assert gpus is not None
        return f"symmetric memory, copies by {_who_copies(gpus)} and a barrier of one block, {gpus.words}"

    def move(self, plan: GatherPlan, local: torch.Tensor, everyone: torch.Tensor) -> float:
        shape = self._shape
        assert shape is not None and shape.window.everyone_ND is everyone
        for theirs_RD in shape.window.at_peers:
            theirs_RD.copy_(local)
        self.meet(shape)
        return 0.0

    def meet(self, shape: Shape) -> None:
        """Holds the lane until those of all ranks have come here, and what they have copied is there. It has no time-out of its own, which would
        take the device's context along: the lanes' drain has one."""
        shape.handle.barrier()

    def _buffers_for(self, wire_rows: int, cp_size: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The next in turn. A collective of hosts for a shape that is new: all ranks gather the same shapes in the same order."""
        key = (wire_rows, like.shape[1], like.dtype)
        if key not in self._shapes:
            self._shapes[key] = self._open(wire_rows, cp_size, like)
        self._shape = self._shapes[key]
        self._shape.turn()
        return self._shape.window.mine_RD, self._shape.window.everyone_ND

    def _open(self, wire_rows: int, cp_size: int, like: torch.Tensor) -> Shape:
        group, width = self.transport.group, like.shape[1]
        assert group is not None, "a split plan has several ranks"
        sizes = (TURNS, cp_size * wire_rows, width)
        buffers = symmetric_memory.empty(sizes, dtype=like.dtype, device=like.device)
        # torch clears it, and the barrier's signals behind it, on a stream of its own: a peer's first signal, or its rows, must not come before.
        torch.cuda.synchronize(like.device)
        handle = symmetric_memory.rendezvous(buffers, group)
        rank: int = handle.rank
        mine = slice(rank * wire_rows, (rank + 1) * wire_rows)
        peers = [(rank + step) % cp_size for step in range(1, cp_size)]
        remote = [handle.get_buffer(peer, sizes, like.dtype) for peer in peers]
        windows = (
            Window(buffers[turn], buffers[turn][mine], tuple(peer[turn][mine] for peer in remote)) for turn in range(TURNS)
        )
        return Shape(handle, tuple(windows))


def _who_copies(gpus: GpuMap) -> str:
    """Seen on H100s with all SMs held: a copy inside a GPU waits for them, and so does one to a GPU that the process does not see, which the driver
    takes for its own; one to a GPU that it sees does not."""
    num_gpus = len(set(gpus.uuids))
    if num_gpus == 1:
        return "kernels inside a GPU"
    return "copy engines" if torch.cuda.device_count() >= num_gpus else "kernels (CUDA_VISIBLE_DEVICES hides the peers' GPUs)"
