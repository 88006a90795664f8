"""The projection of index keys, with partial sums promoted out of the matrix unit.

Hopper's matrix unit cuts bits off where it aligns the addends of a sum, always towards zero, so a sum of 7168 products that stays in it drifts.
DeepSeek-V3's technical report (section 3.3.2) tells of it for fp8, and promotes partial sums to the CUDA cores every 128 products. With bf16 the
drift is smaller, yet it turns one rounding of k in 240, and the top-k of 16K keys and more loses over a thousandth for it. So here the matrix
unit sums runs of 128 products, and the CUDA cores add the runs, in fp32 and to nearest.

The sum is one tree that depends on X alone: seven groups of consecutive runs; each group's runs in order; then the groups in order. Few rows are
spread over the device by giving each group of a tile to a thread block of its own, and adding the groups in a second kernel; the additions and their
order stay as they are. So the bits of a row depend neither on the number of rows nor on its place among them: the key of a token is the
same under every split.

On an H100 whose L2 was flushed, 1024 rows and fewer cost what the vendor's product costs or less, 2048 rows 9 % more, 8192 and 16384 rows up
to 4 % more. Between those sizes the thread blocks fit worse: 4096 rows take 44 us against 34, 9000 rows 82 against 61.

Shape suffixes: T rows, X hidden, D head dim (128), G groups.
"""
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from workers.kernels.nvrtc import count_sms
from workers.kernels.operators import operator
from workers.kernels.tile import HEAD_DIM

RUN = 128
"""Products that the matrix unit sums: one tile of the loop, so that a run costs one addition an element. On an H100 one rounding to bf16 in 8,000 is
not the exact sum's; with runs of 256 products it is one in 4,500, of 512 one in 2,600, of 1024 one in 1,600, and one in 3,700 in the
vendor's product of fp32."""
GROUPS = 7
"""Of eight runs each for X = 7168: 16, 32, 64 or 128 rows by seven groups give 256, 512, 1024 or 2048 rows 112 thread blocks."""
_SUMMED = 512
"""Elements of a thread block of the second kernel."""


class _Shape(NamedTuple):
    """How the work is laid out: `parts` thread blocks, one or GROUPS, share the tree of `tile_rows` rows."""

    tile_rows: int
    parts: int
    warps: int
    stages: int
    rounds: int = 1
    """Thread blocks that a multiprocessor may run, one after the other, before another shape is better."""


_SHAPES = (
    _Shape(16, GROUPS, 4, 4),
    _Shape(32, GROUPS, 4, 4),
    _Shape(64, GROUPS, 8, 4),
    _Shape(128, GROUPS, 8, 3, rounds=2),
    _Shape(64, 1, 8, 4),
    _Shape(128, 1, 8, 3),
)
"""The first that needs no more rounds than it may is taken, else the last. All but the smallest fill a multiprocessor's shared memory."""


@triton.jit
def _add(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    """a + b in fp32, as an instruction: of a plain sum with a matrix product the compiler makes that product's own accumulator."""
    return tl.inline_asm_elementwise("add.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit(do_not_specialize=["num_rows"])
def _project_kernel(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_rows: tl.tensor,
    X: tl.constexpr,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_RUNS: tl.constexpr,
    PARTS: tl.constexpr,
    R: tl.constexpr,
) -> None:
    """Of tile i // PARTS the whole sums in bf16, or group i % PARTS of them in fp32 [GROUPS, T, D]."""
    part = tl.program_id(0) % PARTS
    t = tl.program_id(0) // PARTS * R + tl.arange(0, R)
    d, k = tl.arange(0, 128), tl.arange(0, K)
    row = tl.minimum(t, num_rows - 1).to(tl.int64)
    first = part * (GROUP_RUNS * K)
    x_ptrs = x_ptr + row[None, :] * X + (first + k)[:, None]
    weight_ptrs = weight_ptr + d[:, None] * X + (first + k)[None, :]
    # Transposed, since a tile of the matrix unit has at least 64 rows and as few columns as one likes.
    group = tl.zeros([128, R], tl.float32)
    total = group
    for i in range(GROUPS * GROUP_RUNS // PARTS):
        if X == GROUPS * GROUP_RUNS * K:
            x, weight = tl.load(x_ptrs), tl.load(weight_ptrs)
        else:
            is_inside = first + i * K + k < X
            x = tl.load(x_ptrs, mask=is_inside[:, None], other=0.0)
            weight = tl.load(weight_ptrs, mask=is_inside[None, :], other=0.0)
        x_ptrs += K
        weight_ptrs += K
        group = _add(group, tl.dot(weight, x))
        if PARTS == 1:
            is_end = i % GROUP_RUNS == GROUP_RUNS - 1
            total = tl.where(is_end, _add(total, group), total)
            group = tl.where(is_end, 0.0, group)
    at = t.to(tl.int64)[:, None] * 128 + d[None, :]
    if PARTS == 1:
        tl.store(out_ptr + at, tl.trans(total).to(tl.bfloat16), mask=(t < num_rows)[:, None])
    else:
        tl.extra.cuda.gdc_launch_dependents()
        tl.store(out_ptr + part * (num_rows.to(tl.int64) * 128) + at, tl.trans(group), mask=(t < num_rows)[:, None])


@triton.jit(do_not_specialize=["num_rows"])
def _sum_kernel(
    partial_ptr: tl.tensor, out_ptr: tl.tensor, num_rows: tl.tensor, GROUPS: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    """Sums the groups in order. Its thread blocks may start while those of the first kernel end, and wait for them."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    count = num_rows.to(tl.int64) * 128
    total = tl.zeros([BLOCK], tl.float32)
    tl.extra.cuda.gdc_wait()
    for i in tl.static_range(GROUPS):
        total = _add(total, tl.load(partial_ptr + i * count + at, mask=at < count, other=0.0))
    tl.store(out_ptr + at, total.to(tl.bfloat16), mask=at < count)


def _shape_for(num_rows: int, num_sms: int) -> _Shape:
    for shape in _SHAPES:
        if -(-num_rows // shape.tile_rows) * shape.parts <= shape.rounds * num_sms:
            return shape
    return _SHAPES[-1]


@operator("project_key(Tensor x, Tensor weight) -> Tensor")
def _project_key(x_TX: torch.Tensor, weight_DX: torch.Tensor) -> torch.Tensor:
    num_rows, hidden = x_TX.shape
    out_TD = torch.empty(num_rows, HEAD_DIM, dtype=torch.bfloat16, device=x_TX.device)
    if num_rows == 0:
        return out_TD
    shape = _shape_for(num_rows, count_sms(x_TX.device.index))
    sums_GTD = torch.empty(GROUPS, num_rows, HEAD_DIM, dtype=torch.float32, device=x_TX.device) if shape.parts > 1 else None
    _project_kernel[(-(-num_rows // shape.tile_rows) * shape.parts,)](
        x_TX, weight_DX, out_TD if sums_GTD is None else sums_GTD, num_rows, hidden, RUN, GROUPS, -(-hidden // (GROUPS * RUN)),
        shape.parts, shape.tile_rows, num_warps=shape.warps, num_stages=shape.stages,
    )  # fmt: skip
    if sums_GTD is not None:
        blocks = -(-out_TD.numel() // _SUMMED)
        _sum_kernel[(blocks,)](sums_GTD, out_TD, num_rows, GROUPS, _SUMMED, num_warps=4, launch_pdl=True)
    return out_TD


def project_key(x_TX: torch.Tensor, weight_DX: torch.Tensor) -> torch.Tensor:
    """x @ weight^T, summed as this module says and rounded once to bf16 [T, D].

    Args:
        x_TX: bf16, contiguous; any T and X, though runs that X does not fill are read under a mask.
        weight_DX: bf16, contiguous; D is 128.

    Raises:
        ValueError: Other types or shapes.
    """
    if x_TX.dim() != 2 or weight_DX.shape != (HEAD_DIM, x_TX.shape[1]):
        raise ValueError(f"wants [T, X] and [{HEAD_DIM}, X], not {list(x_TX.shape)} and {list(weight_DX.shape)}")
    for x in (x_TX, weight_DX):
        if x.dtype != torch.bfloat16 or not x.is_contiguous():
            raise ValueError(f"wants contiguous bf16, not {x.dtype} with strides {x.stride()}")
    return _project_key(x_TX, weight_DX)
