"""Schedules of ranks whose device breaks, or whose peer is killed and leaves them a broken device.

Ranks alone run them: a test names them as `tests.workers.mutants_of_devices:NAME` in an arm.
"""

from __future__ import annotations

import os
import signal
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from workers.schedules import serial

ERROR = "CUDA error: an illegal memory access was encountered\nSearch for `cudaErrorIllegalAddress' in the manual."
"""As torch words one: a line, and advice."""

Result = tuple[torch.Tensor, torch.Tensor]


def rank_2_is_killed(ix: Any, shard: Any, exchange: Any) -> NoReturn:
    """Its peers' devices report an error, as those of MPS clients on the same GPU do."""
    if dist.get_rank() == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    raise torch.AcceleratorError(ERROR)


def device_of_rank_1_fails(ix: Any, shard: Any, exchange: Any) -> Result:
    """By itself."""
    if dist.get_rank() == 1:
        raise torch.AcceleratorError(ERROR)
    return serial(ix, shard, exchange)
