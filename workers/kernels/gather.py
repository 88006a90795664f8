"""What a gather does on the device besides the wire, and a wire that is modelled.

Rows are moved as 32-bit words, whatever their type: bf16 keys of 256 bytes, or packed ones of 132. A unit is what one access of a thread moves: four
words where every boundary between rows that counts is one of units, else one.

Shape suffixes: T rows on this rank, R rows of a padded shard, S step tokens, N rows of the gathered buffer, D values of a row.
"""
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from workers.kernels.clock import spin_until
from workers.kernels.operators import operator

WRITER_WARPS = 16
"""512 threads, as many as a channel of NCCL's simple protocol has."""


@triton.jit
def _words(ptr: tl.tensor) -> tl.tensor:
    return ptr.to(tl.pointer_type(tl.int32))


@triton.jit(do_not_specialize=["used", "count"])
def _pad_kernel(
    k_ptr: tl.tensor, out_ptr: tl.tensor, used: tl.tensor, count: tl.tensor, UNIT: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    u = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[:, None]
    at = u * UNIT + tl.arange(0, UNIT)[None, :]
    tl.store(_words(out_ptr) + at, tl.load(_words(k_ptr) + at, mask=u < used, other=0), mask=u < count)


@triton.jit(do_not_specialize=["num_rows"])
def _reorder_kernel(
    everyone_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_rows: tl.tensor,
    WORDS: tl.constexpr,
    TILE_WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    s = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    w = tl.arange(0, TILE_WORDS)[None, :]
    is_inside = (s < num_rows)[:, None] & (w < WORDS)
    source = tl.load(rows_ptr + s, mask=s < num_rows, other=0).to(tl.int64)
    rows = tl.load(_words(everyone_ptr) + source[:, None] * WORDS + w, mask=is_inside, other=0)
    tl.store(_words(out_ptr) + s.to(tl.int64)[:, None] * WORDS + w, rows, mask=is_inside)


@triton.jit
def _offsets(
    first: tl.tensor, last: tl.tensor, skip_start: tl.tensor, skip_units: tl.tensor, UNIT: tl.constexpr, CHUNK: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Where a chunk's words lie in the buffer, and which of its units belong to the share."""
    u = first + tl.arange(0, CHUNK)[:, None]
    is_ours = u < last
    u = tl.where(u >= skip_start, u + skip_units, u)
    return u * UNIT + tl.arange(0, UNIT)[None, :], is_ours


@triton.jit
def _load_chunk(
    source_ptr: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    skip_start: tl.tensor,
    skip_units: tl.tensor,
    UNIT: tl.constexpr,
    CHUNK: tl.constexpr,
) -> tl.tensor:
    at, is_ours = _offsets(first, last, skip_start, skip_units, UNIT, CHUNK)
    return tl.load(_words(source_ptr) + at, mask=is_ours, other=0)


@triton.jit
def _write_chunk(
    out_ptr: tl.tensor,
    chunk: tl.tensor,
    at_unit: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    start_ns: tl.tensor,
    wire_ns: tl.tensor,
    skip_start: tl.tensor,
    skip_units: tl.tensor,
    UNIT: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """Writes a chunk when its last unit has arrived."""
    if at_unit < last:
        arrived = tl.minimum(at_unit + CHUNK, last) - first
        due_ns = start_ns + (arrived * wire_ns + (last - first) - 1) // (last - first)
        now_ns = spin_until(due_ns)
        at, is_ours = _offsets(at_unit, last, skip_start, skip_units, UNIT, CHUNK)
        # The time is part of the store's own condition: no compiler may move it ahead of the wait.
        tl.store(_words(out_ptr) + at, chunk, mask=is_ours & (now_ns >= due_ns))


@triton.jit(do_not_specialize=["num_units", "skip_start", "skip_units", "latency_ns", "wire_ns"])
def _paced_kernel(
    source_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_units: tl.tensor,
    skip_start: tl.tensor,
    skip_units: tl.tensor,
    latency_ns: tl.tensor,
    wire_ns: tl.tensor,
    UNIT: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    start_ns = spin_until(tl.full([], 0, tl.int64)) + latency_ns
    cta, ctas = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    wire_ns = wire_ns.to(tl.int64)
    first = cta * num_units // ctas
    last = (cta + 1) * num_units // ctas
    # Four chunks are read ahead of their time, in registers.
    a = _load_chunk(source_ptr, first, last, skip_start, skip_units, UNIT, CHUNK)
    b = _load_chunk(source_ptr, first + CHUNK, last, skip_start, skip_units, UNIT, CHUNK)
    c = _load_chunk(source_ptr, first + 2 * CHUNK, last, skip_start, skip_units, UNIT, CHUNK)
    d = _load_chunk(source_ptr, first + 3 * CHUNK, last, skip_start, skip_units, UNIT, CHUNK)
    at = first
    while at < last:
        _write_chunk(out_ptr, a, at, first, last, start_ns, wire_ns, skip_start, skip_units, UNIT, CHUNK)
        a = _load_chunk(source_ptr, at + 4 * CHUNK, last, skip_start, skip_units, UNIT, CHUNK)
        _write_chunk(out_ptr, b, at + CHUNK, first, last, start_ns, wire_ns, skip_start, skip_units, UNIT, CHUNK)
        b = _load_chunk(source_ptr, at + 5 * CHUNK, last, skip_start, skip_units, UNIT, CHUNK)
        _write_chunk(out_ptr, c, at + 2 * CHUNK, first, last, start_ns, wire_ns, skip_start, skip_units, UNIT, CHUNK)
        c = _load_chunk(source_ptr, at + 6 * CHUNK, last, skip_start, skip_units, UNIT, CHUNK)
        _write_chunk(out_ptr, d, at + 3 * CHUNK, first, last, start_ns, wire_ns, skip_start, skip_units, UNIT, CHUNK)
        d = _load_chunk(source_ptr, at + 7 * CHUNK, last, skip_start, skip_units, UNIT, CHUNK)
        at += 4 * CHUNK
    # A block without a share ends with the others.
    spin_until(start_ns + wire_ns)


def _row_words(x: torch.Tensor) -> int:
    """32-bit words of a row.

    Raises:
        ValueError: Rows are not contiguous, or no whole number of words.
    """
    row_bytes = x.shape[1] * x.element_size()
    if row_bytes % 4 or not x.is_contiguous():
        raise ValueError(f"wants contiguous rows of whole 32-bit words, not {x.dtype} {list(x.shape)} with strides {x.stride()}")
    return row_bytes // 4


def _unit(*boundaries: int) -> int:
    return 4 if not any(words % 4 for words in boundaries) else 1


@operator("pad_rows(Tensor k, Tensor(a!) out) -> ()")
def _pad_rows(k_TD: torch.Tensor, out_RD: torch.Tensor) -> None:
    row_words = _row_words(k_TD)
    used, count = k_TD.shape[0] * row_words, out_RD.shape[0] * row_words
    unit = _unit(used, count)
    if count:
        _pad_kernel[(-(-count // (512 * unit)),)](k_TD, out_RD, used // unit, count // unit, unit, 512, num_warps=8)


@operator("reorder(Tensor everyone, Tensor source_rows, Tensor(a!) out) -> ()")
def _reorder(everyone_ND: torch.Tensor, source_rows_S: torch.Tensor, out_SD: torch.Tensor) -> None:
    if num_rows := out_SD.shape[0]:
        words = _row_words(everyone_ND)
        tile_words = triton.next_power_of_2(words)
        _reorder_kernel[(-(-num_rows // 32),)](everyone_ND, source_rows_S, out_SD, num_rows, words, tile_words, 32, num_warps=4)


@operator(
    "write_paced(Tensor source, Tensor(a!) out, int num_ctas, float latency_us, float gbps, int skip_start, int skip_rows) -> ()"
)
def _write_paced(
    source_ND: torch.Tensor, out_ND: torch.Tensor, num_ctas: int, latency_us: float, gbps: float, skip_start: int, skip_rows: int
) -> None:
    row_words = _row_words(source_ND)
    words, before, skipped = (rows * row_words for rows in (source_ND.shape[0] - skip_rows, skip_start, skip_rows))
    unit = _unit(words, before, skipped)
    wire_ns = math.ceil(4 * words / gbps)
    _paced_kernel[(num_ctas,)](
        source_ND, out_ND, words // unit, before // unit, skipped // unit, math.ceil(1e3 * latency_us), wire_ns,
        unit, _chunk_bytes(4 * words / num_ctas, gbps / num_ctas) // (4 * unit), num_warps=WRITER_WARPS, num_stages=1,
    )  # fmt: skip


def _chunk_bytes(share_bytes: float, gbps: float) -> int:
    """The least that keeps enough in flight for a thread block's share and pace: small chunks write evenly, and leave little for the end.

    On an H100 four chunks of 8 KiB sustain 25 GB/s a block, of 16 KiB 35, of 32 KiB 38 (45 where only four blocks run, which is what one SM copies).
    A share of four chunks is read before its time.
    """
    for chunk, sustained_gbps in ((8192, 12.0), (16384, 20.0)):
        if share_bytes <= 4 * chunk or gbps <= sustained_gbps:
            return chunk
    return 32768


def _check_alike(what: str, source: torch.Tensor, out: torch.Tensor) -> None:
    if source.dtype != out.dtype or source.shape[1:] != out.shape[1:] or not out.is_contiguous():
        raise ValueError(f"cannot {what} {source.dtype} {list(source.shape)} into {out.dtype} {list(out.shape)}")


def pad_rows(k_TD: torch.Tensor, out_RD: torch.Tensor) -> None:
    """Copies the T rows of `k_TD` to the head of `out_RD`, R >= T, and writes zeros after them."""
    if k_TD.shape[0] > out_RD.shape[0]:
        raise ValueError(f"cannot pad {list(k_TD.shape)} into {list(out_RD.shape)}")
    _check_alike("pad", k_TD, out_RD)
    _pad_rows(k_TD, out_RD)


def reorder(everyone_ND: torch.Tensor, source_rows_S: torch.Tensor, out_SD: torch.Tensor) -> None:
    """Writes `everyone_ND[source_rows_S]` to `out_SD`: trim and re-range in one pass. Rows int64 or int32."""
    _check_alike("reorder", everyone_ND, out_SD)
    _reorder(everyone_ND, source_rows_S, out_SD)


def write_paced(
    source_ND: torch.Tensor,
    out_ND: torch.Tensor,
    num_ctas: int,
    latency_us: float,
    gbps: float,
    skip_start: int = 0,
    skip_rows: int = 0,
) -> None:
    """Stands in for the wire of a collective: rows appear in `out_ND` at the pace of a link, under as many thread blocks as channels.

    Each block owns an equal run of what is written. It waits `latency_us` from its own start, then writes chunk after chunk (8 to 32 KiB), each when
    the chunk's end has arrived: at the share of bytes / gbps that lies before it. No row is written before its time; a block that fell behind
    catches up as fast as the memory lets it. The kernel ends no earlier than latency + bytes / gbps after its start.

    The pace must be one that the blocks can hold. On an H100, within 3 % and about a microsecond: 32 of them 450 GB/s, beside a large matrix product
    too; 16 of them 450 alone and 200 beside it; 8 of them 200; 4 of them 50, and not 200.

    Args:
        source_ND: What arrives; contiguous, of any type.
        out_ND: As the source.
        num_ctas: Thread blocks of 512 threads, each of which keeps its place on an SM from start to end.
        latency_us: Before the first byte.
        gbps: 1e9 bytes a second, of all blocks together.
        skip_start, skip_rows: The rank's own rows, which are in place: neither written nor counted.
    """
    if source_ND.shape != out_ND.shape:
        raise ValueError(f"source {list(source_ND.shape)}, out {list(out_ND.shape)}")
    _check_alike("write", source_ND, out_ND)
    if num_ctas < 1 or gbps <= 0 or latency_us < 0 or not 0 <= skip_start <= skip_start + skip_rows <= source_ND.shape[0]:
        raise ValueError(f"num_ctas {num_ctas}, gbps {gbps}, latency_us {latency_us}, skip {skip_start}+{skip_rows}")
    _write_paced(source_ND, out_ND, num_ctas, latency_us, gbps, skip_start, skip_rows)
