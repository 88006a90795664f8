"""Padding, re-range, the modelled wire and the sleeping device, on a CUDA device.

Legend: T rows of a shard, R rows of a padded shard, N rows of the gathered buffer, D head dim.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
pytest.importorskip("triton", reason="the kernels need Triton")

import triton
import triton.language as tl

from workers.kernels.clock import sleep_us
from workers.kernels.gather import pad_rows, reorder, write_paced

pytestmark = pytest.mark.gpu

POISON = 7.0


PACKED = pytest.mark.parametrize("is_packed", [False, True], ids=["bf16", "packed"])


def rows(count: int, is_packed: bool = False) -> torch.Tensor:
    """bf16 [N, 128], or uint8 [N, 132]."""
    g = torch.Generator("cuda").manual_seed(count)
    if is_packed:
        return torch.randint(0, 256, (count, 132), generator=g, device="cuda", dtype=torch.uint8)
    return torch.randn(count, 128, generator=g, device="cuda").bfloat16()


def poisoned(count: int, like: torch.Tensor) -> torch.Tensor:
    return torch.full((count, like.shape[1]), POISON, device="cuda").to(like.dtype)


def elapsed_us(run) -> float:
    """Of the second of two runs, with the host far ahead of the device."""
    run()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    sleep_us(500)
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return 1e3 * begin.elapsed_time(end)


@pytest.mark.parametrize(("used", "padded"), [(0, 0), (0, 3), (1, 1), (5, 9), (1000, 1024), (4097, 4098)])
@PACKED
def test_a_shard_is_copied_and_zeros_follow(used, padded, is_packed):
    k = rows(used, is_packed)
    out = poisoned(padded, k)
    pad_rows(k, out)
    assert torch.equal(out[:used], k)
    assert not out[used:].any()


def test_a_shard_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="cannot pad"):
        pad_rows(rows(5), rows(4))
    with pytest.raises(ValueError, match="cannot pad"):
        pad_rows(rows(4), rows(4, is_packed=True))
    with pytest.raises(ValueError, match="contiguous"):
        pad_rows(rows(4)[:, :64], rows(4)[:, :64].contiguous())


@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("count", [0, 1, 33, 5000])
@PACKED
def test_rows_come_in_the_order_asked_for(count, index_dtype, is_packed):
    everyone = rows(count + 40, is_packed)
    source = torch.randperm(count + 40, device="cuda")[:count].to(index_dtype)
    out = poisoned(count, everyone)
    reorder(everyone, source, out)
    assert torch.equal(out, everyone[source.long()])


@pytest.mark.parametrize("us", [0.0, 20.0, 300.0, 5000.0])
def test_the_device_sleeps_as_long_as_asked(us):
    empty_us = elapsed_us(lambda: sleep_us(0))
    assert us - 1 <= elapsed_us(lambda: sleep_us(us)) - empty_us <= us + 15


@pytest.mark.parametrize("num_ctas", [1, 4, 16, 32])
@pytest.mark.parametrize(
    ("count", "skip_start", "skip_rows"), [(1, 0, 0), (5, 5, 0), (700, 100, 87), (4000, 0, 500), (4000, 3500, 500), (9, 0, 9)]
)
@PACKED
def test_everything_arrives_but_the_ranks_own_rows(num_ctas, count, skip_start, skip_rows, is_packed):
    source = rows(count, is_packed)
    out = poisoned(count, source)
    write_paced(source, out, num_ctas, 3.0, 300.0, skip_start, skip_rows)
    expected = source.clone()
    expected[skip_start : skip_start + skip_rows] = POISON
    assert torch.equal(out, expected)


@pytest.mark.parametrize("num_ctas", [4, 16, 32])
@pytest.mark.parametrize(("mib", "gbps"), [(1, 50), (7, 50), (7, 100)])
def test_the_wire_takes_its_latency_and_its_pace(num_ctas, mib, gbps):
    source = rows(4096 * mib)
    out = torch.empty_like(source)
    empty_us = elapsed_us(lambda: sleep_us(0))
    floor_us = 12 + 1e-3 * source.numel() * 2 / gbps
    us = elapsed_us(lambda: write_paced(source, out, num_ctas, 12.0, gbps)) - empty_us
    assert floor_us - 1 <= us <= 1.03 * floor_us + 15


def test_what_no_wire_could_be_is_refused():
    with pytest.raises(ValueError, match="gbps 0"):
        write_paced(rows(4), rows(4), 16, 1.0, 0.0)
    with pytest.raises(ValueError, match=r"skip 3\+2"):
        write_paced(rows(4), rows(4), 16, 1.0, 1.0, 3, 2)
    with pytest.raises(ValueError, match="source"):
        write_paced(rows(4), rows(5), 16, 1.0, 1.0)


@triton.jit
def _stamp(out_ptr):
    tl.store(out_ptr, tl.inline_asm_elementwise("mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1))


@triton.jit
def _watch(rows_ptr, seen_ns_ptr, num_rows, watch_ns, BLOCK: tl.constexpr):
    """Notes for every row when its first value was first seen to differ from the poison, 0 if never."""
    r = tl.arange(0, BLOCK)
    seen_ns = tl.zeros([BLOCK], tl.int64)
    began_ns = tl.inline_asm_elementwise("mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1)
    now_ns = began_ns
    while now_ns < began_ns + watch_ns:
        value = tl.load(rows_ptr + r * 128, mask=r < num_rows, other=7.0, volatile=True).to(tl.float32)
        now_ns = tl.inline_asm_elementwise("mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1)
        seen_ns = tl.where((seen_ns == 0) & (value != 7.0), now_ns, seen_ns)
    tl.store(seen_ns_ptr + r, seen_ns, mask=r < num_rows)


@pytest.mark.parametrize("num_ctas", [1, 4])
def test_no_row_is_written_before_its_time(num_ctas):
    """Another kernel watches the rows while they arrive, 1 us a row at one block."""
    count, latency_us, gbps = 1024, 50.0, 0.256 * num_ctas
    source = rows(count).abs() + 8
    out, seen_ns = (
        torch.full((count, 128), POISON, device="cuda").bfloat16(),
        torch.zeros(count, dtype=torch.int64, device="cuda"),
    )
    began_ns = torch.zeros(1, dtype=torch.int64, device="cuda")
    writing, watching = torch.cuda.Stream(), torch.cuda.Stream()
    for _ in range(2):  # the first compiles
        out.fill_(POISON)
        torch.cuda.synchronize()
        with torch.cuda.stream(watching):
            _watch[(1,)](out, seen_ns, count, 5_000_000, count, num_warps=8)
        with torch.cuda.stream(writing):
            sleep_us(400)  # the host gets ahead: the writer starts right after the stamp
            _stamp[(1,)](began_ns, num_warps=1)
            write_paced(source, out, num_ctas, latency_us, gbps)
        torch.cuda.synchronize()
    share = count // num_ctas
    row = torch.arange(count) % share
    due_us = latency_us + row + 1.0  # a block's rows come 1 us apart
    late_us = 1e-3 * (seen_ns.cpu() - began_ns.cpu()) - due_us
    assert bool((seen_ns > 0).all())
    assert float(late_us.min()) >= 0
    # A chunk arrives whole, with its last row.
    assert float(late_us.median()) <= 60


SANITIZED = """
import torch
from torch.cuda._sanitizer import CUDASanitizerErrors
from workers.kernels.gather import pad_rows
k = torch.randn(64, 128, device="cuda").bfloat16()
racy, ordered = torch.zeros_like(k), torch.zeros_like(k)
torch.cuda.synchronize()
side = torch.cuda.Stream()
with torch.cuda.stream(side):
    pad_rows(k, racy)
    pad_rows(k, ordered)
try:
    racy + racy
    print("missed")
except CUDASanitizerErrors:
    print("caught")
torch.cuda.current_stream().wait_stream(side)
ordered + ordered
print("clean")
"""


def test_the_stream_sanitizer_sees_what_a_kernel_writes():
    done = subprocess.run(
        [sys.executable, "-c", SANITIZED],
        check=False,
        env={**os.environ, "TORCH_CUDA_SANITIZER": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.split() == ["caught", "clean"], done.stderr
