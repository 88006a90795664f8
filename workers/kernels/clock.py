"""Kernels that wait by the GPU's own clock (%globaltimer, ns, one for all SMs): one warp spins, which takes a corner of one SM."""
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl


@triton.jit
def spin_until(due_ns: tl.tensor) -> tl.tensor:
    """Returns the time, which is not before `due_ns`; for kernels."""
    now_ns = tl.inline_asm_elementwise("mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1)
    while now_ns < due_ns:
        now_ns = tl.inline_asm_elementwise(
            "nanosleep.u32 20; mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1
        )
    return now_ns


@triton.jit(do_not_specialize=["sleep_ns"])
def _sleep_kernel(sleep_ns: tl.tensor) -> None:
    began_ns = spin_until(tl.full([], 0, tl.int64))
    spin_until(began_ns + sleep_ns)


@triton.jit
def _stamp_kernel(at_ptr: tl.tensor) -> None:
    tl.store(at_ptr, spin_until(tl.full([], 0, tl.int64)))


@triton.jit(do_not_specialize=["after_ns"])
def _wait_kernel(at_ptr: tl.tensor, after_ns: tl.tensor) -> None:
    spin_until(tl.load(at_ptr) + after_ns)


def sleep_us(us: float) -> None:
    """Keeps the current stream busy for `us` microseconds."""
    _sleep_kernel[(1,)](math.ceil(1e3 * us), num_warps=1)


def stamp(at_1: torch.Tensor) -> None:
    """Writes the time at which the current stream comes here, ns, into int64 [1]."""
    _stamp_kernel[(1,)](at_1, num_warps=1)


def wait_until(at_1: torch.Tensor, after_us: float) -> None:
    """Holds the current stream back until `after_us` after a stamp, int64 [1]."""
    _wait_kernel[(1,)](at_1, math.ceil(1e3 * after_us), num_warps=1)
