"""Exact top-k of every row: a radix select, and the selected keys in canonical order.

The score's 32 bits and the index's are one 64-bit number, the larger the better, so that a tie is no special case: the lower index wins. A histogram
of the top 11 bits, in shared memory, finds the bin that the k-th best falls into; a second reading of the row keeps what is above it and gathers
the bin itself, whose further digits are decided in shared memory. Only where the bin is larger than that (ties by the thousand) is the row read
again, a digit at a time. The selected keys are then put in order by score into 2048 bins of equal width and ranked within each; a row whose
scores crowd into few bins is sorted by a bitonic network instead. Both are exact for any finite scores, and nothing depends on which thread
came first: the set is exact, and its order is total.

Why CUDA C++ and not Triton: counting in shared memory and placing by a counter are what the algorithm is, and Triton has neither. Four teams of
threads, each with a row of its own, share one thread block an SM, so that the kernel fills as many SMs as it is given and no others.

Legend: T query rows, N keys, K top-k.
"""

from __future__ import annotations

import functools

import torch

from workers.kernels.nvrtc import Kernel, count_sms
from workers.kernels.operators import operator
from workers.kernels.topk_source import SOURCE

MAX_TOPK = 2048
TEAM, TEAMS = 256, 4
"""Threads that share a row, and how many such to a block. Teams of 512 gain 30 % where rows are fewer than teams, and lose 20 % elsewhere."""
LOADS = 4
"""Of 16 bytes, under way at a time in every thread."""
PARAMETERS = tuple("QqQQQiiii")
"""Of the kernel: address and stride of the logits, three addresses, three sizes, a flag."""
TEAM_BYTES = 8 * (2 * MAX_TOPK) + 4 * (2048 + 3 * 32 + 8)
"""Of shared memory, at least what the kernel's `Team` takes."""


@functools.cache
def kernel() -> Kernel:
    """The kernel. Its shared memory is over half of an SM's: one block each."""
    defines = f"TEAM={TEAM}", f"TEAMS={TEAMS}", f"LOADS={LOADS}"
    return Kernel("topk_positions", SOURCE, defines, TEAM * TEAMS, TEAMS * TEAM_BYTES, PARAMETERS)


def topk_positions(logits_TN: torch.Tensor, ks_T: torch.Tensor, ke_T: torch.Tensor, topk: int, num_sms: int = 0) -> torch.Tensor:
    """int32 [T, K]: positions in the request (n - ks) of the best visible keys, by score descending, then index ascending; -1 pads.

    A row that sees at most K keys selects all of them. Nothing outside ks <= n < ke is read.

    Args:
        logits_TN: fp32, rows at any stride.
        ks_T: int32 start of each row's visible keys.
        ke_T: int32 end, exclusive; at most N counts.
        topk: K, at most 2048.
        num_sms: How many SMs to use; 0 for all.
    """
    out_TK = torch.empty(logits_TN.shape[0], topk, dtype=torch.int32, device=logits_TN.device)
    topk_positions_into(logits_TN, ks_T, ke_T, out_TK, num_sms)
    return out_TK


@operator("topk_positions_into(Tensor logits, Tensor ks, Tensor ke, Tensor(a!) out, int num_sms, bool is_ordered=True) -> ()")
def topk_positions_into(
    logits_TN: torch.Tensor, ks_T: torch.Tensor, ke_T: torch.Tensor, out_TK: torch.Tensor, num_sms: int, is_ordered: bool = True
) -> None:
    """As `topk_positions`. Without order the set is the same, in whatever order threads came: what inference takes, and good for timing only."""
    num_rows, num_keys = logits_TN.shape
    topk = out_TK.shape[1]
    if not 1 <= topk <= MAX_TOPK:
        raise ValueError(f"topk {topk}: the CUDA kernel selects 1 to {MAX_TOPK}")
    if logits_TN.dtype != torch.float32 or (num_keys > 1 and logits_TN.stride(1) != 1):
        raise ValueError(f"wants fp32 logits in rows, not {logits_TN.dtype} with strides {logits_TN.stride()}")
    if not all(x.dtype == torch.int32 and x.is_contiguous() for x in (ks_T, ke_T, out_TK)):
        raise ValueError("wants ks, ke and the positions as contiguous int32")
    if not num_rows:
        return
    available = count_sms(logits_TN.device.index)
    addresses = ks_T.data_ptr(), ke_T.data_ptr(), out_TK.data_ptr()
    blocks, sizes = min(num_rows, num_sms or available, available), (num_rows, num_keys, topk)
    kernel().launch(logits_TN.device, blocks, logits_TN.data_ptr(), logits_TN.stride(0), *addresses, *sizes, is_ordered)
