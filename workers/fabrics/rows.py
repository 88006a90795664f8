"""The copies of a gather beside the wire: rows into a padded send buffer, and gathered rows into token order.

Legend: T rows on this rank, R rows of a padded shard, S step tokens, N gathered rows, D head dim (or the bytes of a packed key).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch


class RowMoves(NamedTuple):
    """How a device does them."""

    pad: Callable[[torch.Tensor, torch.Tensor], None]
    """[T, D] to the head of [R, D], zeros behind."""
    reorder: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
    """Rows int64 [S] of [N, D] into [S, D]: trim and re-range in one pass."""


def row_moves(device: torch.device) -> RowMoves:
    """Our kernels on a GPU, where `index_select` reaches a third to a half of a copy's bandwidth; torch's operators elsewhere."""
    if device.type == "cuda":
        from workers.kernels.gather import pad_rows, reorder

        return RowMoves(pad_rows, reorder)
    return RowMoves(_pad, _reorder)


def _pad(k_TD: torch.Tensor, out_RD: torch.Tensor) -> None:
    rows = k_TD.shape[0]
    out_RD[:rows] = k_TD
    out_RD[rows:] = 0


def _reorder(everyone_ND: torch.Tensor, source_rows_S: torch.Tensor, out_SD: torch.Tensor) -> None:
    torch.index_select(everyone_ND, 0, source_rows_S, out=out_SD)
