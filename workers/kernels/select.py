"""Logits and top-k of a step, a range of query rows at a time.

Legend: T query rows, N packed keys, H heads, D head dim, K top-k, B elements of the logits buffer.
"""

from __future__ import annotations

import torch

from workers.indexer.stages import RowRange
from workers.kernels.logits import mqa_logits_into
from workers.kernels.topk import topk_positions_into

BYTES_PER_LOGIT = 4
"""What `select` holds for one row and key, besides the few bytes a row that its stride is rounded up by."""
ALIGNMENT = 4
"""Rows of the buffer start at 16 bytes."""


def select(
    q8_THD: torch.Tensor,
    k8_ND: torch.Tensor,
    k_scale_N: torch.Tensor,
    gates_TH: torch.Tensor,
    ks_T: torch.Tensor,
    ke_T: torch.Tensor,
    topk: int,
    ranges: tuple[RowRange, ...],
    num_sms: int = 0,
) -> torch.Tensor:
    """int32 [T, K], as `workers.indexer.stages.select`. The host waits for nothing: after a first call it can be captured in a CUDA graph.

    All ranges share one buffer of logits, as large as the largest of them needs (`row_ranges` with BYTES_PER_LOGIT bounds it).

    Args:
        q8_THD: e4m3fn queries.
        k8_ND: e4m3fn keys.
        k_scale_N: fp32 scales of the keys.
        gates_TH: fp32 gates of the heads.
        ks_T: int32 start of each row's visible keys.
        ke_T: int32 end, exclusive.
        topk: K.
        ranges: Of rows; rows in none of them are all -1.
        num_sms: How many SMs either kernel may use; 0 for all.
    """
    out_TK = empty_positions(q8_THD.shape[0], topk, ranges, q8_THD.device)
    sizes = [(r.end - r.start) * _stride(r.num_keys) for r in ranges]
    buffer_B = torch.empty(max(sizes, default=0), dtype=torch.float32, device=q8_THD.device)
    for r, size in zip(ranges, sizes, strict=True):
        rows, keys = slice(r.start, r.end), slice(0, r.num_keys)
        logits = buffer_B[:size].view(r.end - r.start, _stride(r.num_keys))[:, : r.num_keys]
        mqa_logits_into(q8_THD[rows], k8_ND[keys], k_scale_N[keys], gates_TH[rows], ks_T[rows], ke_T[rows], logits, num_sms)
        topk_positions_into(logits, ks_T[rows], ke_T[rows], out_TK[rows], num_sms)
    return out_TK


def empty_positions(num_rows: int, topk: int, ranges: tuple[RowRange, ...], device: torch.device) -> torch.Tensor:
    """int32 [T, K] for the selections of all ranges to be written into; rows in none of them are -1."""
    out_TK = torch.empty(num_rows, topk, dtype=torch.int32, device=device)
    is_covered = sum(r.end - r.start for r in ranges) == num_rows
    return out_TK if is_covered else out_TK.fill_(-1)


def _stride(num_keys: int) -> int:
    return -(-num_keys // ALIGNMENT) * ALIGNMENT
