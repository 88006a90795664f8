"""How fast the two heavy kernels select: logits and top-k of one causal sequence, beside the fp8 matrix peak of the same card.

    python -m tests.benchmarks.bench_kernels_select --out FILE.json [--sizes 4096 8192 16384 32768 65536] [--logits-mib 256]

For every size S: S queries of 64 heads see the keys up to themselves. `logits` and `top-k` are timed apart, over the chunks that `select` makes of S
rows, and `select` whole; `unordered` is top-k without the canonical order, as inference engines take it. Every time is a median, by CUDA
events, with L2 flushed before each run. TFLOP/s count 2 H D sum(ke - ks). `peak` is torch's fp8 matrix product of the same run. `published` is
DeepGEMM's logits and torch.topk on an H200, as published for SGLang: another card, and no canonical order. Where the package deep_gemm is installed,
its logits are timed beside ours, turn by turn.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from workers.indexer.stages import RowRange, row_ranges
from workers.kernels.deep_gemm import deep_gemm_logits
from workers.kernels.logits import mqa_logits_into
from workers.kernels.nvrtc import count_sms
from workers.kernels.select import BYTES_PER_LOGIT, select
from workers.kernels.topk import topk_positions_into

HEADS, HEAD_DIM, TOPK = 64, 128, 2048
SIZES = (4096, 8192, 16384, 32768, 65536)
PUBLISHED_MS = {4096: 0.699, 8192: 1.990, 16384: 6.546, 32768: 28.39, 65536: 114.7}
HAS_DEEP_GEMM = importlib.util.find_spec("deep_gemm") is not None
FLUSHED_BYTES = 128 << 20
HEAD_START_CYCLES = 500_000
"""The device sleeps for so long before each run: the host's own time stays out of it."""


def timed_ms(run: Callable[[], Any], repeats: int, flush: torch.Tensor) -> float:
    """Median of runs after two that are not counted."""
    times = []
    for i in range(repeats + 2):
        flush.zero_()
        torch.cuda._sleep(HEAD_START_CYCLES)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        if i >= 2:
            times.append(begin.elapsed_time(end))
    return median(times)


def peak_tflops(size: int, flush: torch.Tensor) -> float:
    """torch's fp8 matrix product, size^3."""
    a, b = (torch.randn(size, size, device="cuda").to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device="cuda")
    ms = timed_ms(lambda: torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True), 10, flush)
    return 2 * size**3 / ms / 1e9


def make_inputs(size: int) -> tuple[torch.Tensor, ...]:
    """q8, k8, k_scale, gates, ks, ke: normal queries and keys as quantisation leaves them."""
    g = torch.Generator("cuda").manual_seed(size)
    q8, k8 = (
        (torch.randn(*shape, HEAD_DIM, generator=g, device="cuda") * 120).clamp(-448, 448).to(torch.float8_e4m3fn)
        for shape in ((size, HEADS), (size,))
    )
    gates = torch.randn(size, HEADS, generator=g, device="cuda") * 1e-3
    ke = torch.arange(1, size + 1, dtype=torch.int32, device="cuda")
    return q8, k8, torch.rand(size, generator=g, device="cuda") + 0.5, gates, torch.zeros_like(ke), ke


def measure(size: int, logits_mib: int, peak: float, flush: torch.Tensor) -> dict[str, Any]:
    """One row of the table."""
    q8, k8, k_scale, gates, ks, ke = make_inputs(size)
    ranges = row_ranges(ke.cpu(), size, BYTES_PER_LOGIT, logits_mib)
    repeats = 20 if size <= 32768 else 7
    out = torch.empty(size, TOPK, dtype=torch.int32, device="cuda")
    sms = count_sms(torch.cuda.current_device())
    buffer = torch.empty(max((r.end - r.start) * r.num_keys for r in ranges), device="cuda")

    def of(r: RowRange) -> tuple[slice, slice, torch.Tensor]:
        logits = buffer[: (r.end - r.start) * r.num_keys].view(-1, r.num_keys)
        return slice(r.start, r.end), slice(0, r.num_keys), logits

    def make_logits() -> None:
        for rows, keys, logits in map(of, ranges):
            mqa_logits_into(q8[rows], k8[keys], k_scale[keys], gates[rows], ks[rows], ke[rows], logits, 0)

    def make_their_logits() -> None:
        for rows, keys, _ in map(of, ranges):
            deep_gemm_logits(q8[rows], k8[keys], k_scale[keys], gates[rows], ks[rows], ke[rows], sms, False)

    def make_topk(is_ordered: bool) -> float:
        # Each chunk's own logits, so that the times of the chunks add up to that of the whole.
        total = 0.0
        for rows, keys, logits in map(of, ranges):
            mqa_logits_into(q8[rows], k8[keys], k_scale[keys], gates[rows], ks[rows], ke[rows], logits, 0)
            chunk = ks[rows], ke[rows], out[rows]
            total += timed_ms(
                lambda x=logits, c=chunk: topk_positions_into(x, *c, 0, is_ordered), repeats if len(ranges) < 8 else 3, flush
            )
        return total

    turns = [
        (timed_ms(make_logits, repeats, flush), timed_ms(make_their_logits, repeats, flush) if HAS_DEEP_GEMM else None)
        for _ in range(3)
    ]
    logits_ms = median(ours for ours, _ in turns)
    theirs = [theirs for _, theirs in turns if theirs is not None]
    tflops = 2 * HEADS * HEAD_DIM * size * (size + 1) / 2 / logits_ms / 1e9
    return {
        "size": size,
        "chunks": len(ranges),
        "logits_ms": logits_ms,
        "tflops": tflops,
        "share_of_peak": tflops / peak,
        "deep_gemm_ms": median(theirs) if theirs else None,
        "topk_ms": make_topk(True),
        "topk_unordered_ms": make_topk(False),
        "select_ms": timed_ms(lambda: select(q8, k8, k_scale, gates, ks, ke, TOPK, ranges), repeats, flush),
        "published_ms": PUBLISHED_MS.get(size),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--logits-mib", type=int, default=256)
    args = parser.parse_args()
    flush = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device="cuda")
    peaks = {size: peak_tflops(size, flush) for size in (8192, 16384)}
    card = torch.cuda.get_device_name()
    print(
        f"{card}, torch {torch.__version__}; fp8 matrix peak " + ", ".join(f"{v:.0f} TFLOP/s ({k}^3)" for k, v in peaks.items())
    )
    print("     S chunks  logits   TFLOP/s   peak  DeepGEMM   top-k  (unordered)     sum  select  published  ratio")
    rows = []
    for size in args.sizes:
        row = measure(size, args.logits_mib, max(peaks.values()), flush)
        rows.append(row)
        theirs = f"{row['deep_gemm_ms']:9.3f}" if HAS_DEEP_GEMM else f"{'-':>9}"
        both, published = row["logits_ms"] + row["topk_ms"], row["published_ms"]
        print(
            f"{size:6d} {row['chunks']:6d} {row['logits_ms']:7.3f} {row['tflops']:9.0f} {row['share_of_peak']:6.1%} {theirs} {row['topk_ms']:7.3f} "
            f"{row['topk_unordered_ms']:12.3f} {both:7.3f} {row['select_ms']:7.3f} "
            + (f"{published:10.3f} {published / row['select_ms']:5.2f}x" if published else ""),
            flush=True,
        )
    if args.out:
        record = {"card": card, "torch": torch.__version__, "logits_mib": args.logits_mib, "peak_tflops": peaks, "rows": rows}
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
