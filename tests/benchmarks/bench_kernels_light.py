"""What share of the copy bandwidth the light stages reach, and what enqueuing one costs the host.

    python -m tests.benchmarks.bench_kernels_light --out FILE.json [--rows 512 1024 2048 4096 8192 16384]

Rotary embedding, Hadamard rotation, quantisation of q, the store of keys and the fused pass over q, at T x 64 x 128 (keys: T x 64 rows of 128); the
projection of T keys from 7168 values, by our kernel and by the vendor's library, which gives other bits. Every
time is a median by CUDA events, with L2 flushed before each run and the host ahead of the device. `share` sets the bytes that a stage
must read and write over its time against a device copy of as many bytes, timed in the same run. The events around a kernel that does
nothing are `empty` us apart; nothing is subtracted. The host's time is per call, of calls that the device keeps up with.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from experiments.spec.dims import PRESETS, DimsSpec
from workers.indexer import stages
from workers.indexer.rope import RotaryTable
from workers.kernels import fused, separate
from workers.kernels.clock import sleep_us
from workers.kernels.gather import pad_rows, reorder, write_paced
from workers.kernels.project import project_key

V32, GLM5 = PRESETS["deepseek_v32"], PRESETS["glm_5"]
HEADS, HEAD_DIM = 64, 128
ROWS = (512, 1024, 2048, 4096, 8192, 16384)
FLUSHED_BYTES = 256 << 20
REPEATS = 25
HEAD_START_US = 150.0


def timed_us(run: Callable[[], Any], flush: torch.Tensor) -> float:
    """Median of runs after two that are not counted."""
    pairs = []
    for _ in range(REPEATS + 2):
        flush.zero_()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        sleep_us(HEAD_START_US)
        begin.record()
        run()
        end.record()
        pairs.append((begin, end))
    torch.cuda.synchronize()
    return median(1e3 * begin.elapsed_time(end) for begin, end in pairs[2:])


def host_us(run: Callable[[], Any]) -> float:
    """Median over batches of ten calls."""
    times = []
    for _ in range(REPEATS):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(10):
            run()
        times.append((time.perf_counter() - began) / 10 * 1e6)
    return median(times)


def tables(rows: int, dims: DimsSpec) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = RotaryTable(dims).cos_sin(torch.arange(rows))
    return cos.cuda(), sin.cuda()


def stages_at(rows: int) -> dict[str, tuple[Callable[[], Any], int]]:
    """Every stage of the table, and the bytes that it must read and write."""
    g = torch.Generator("cuda").manual_seed(rows)
    q = torch.randn(rows, HEADS, HEAD_DIM, generator=g, device="cuda").bfloat16()
    keys = q.view(-1, HEAD_DIM)
    k = q[:, 0].contiguous()
    (cos, sin), (cos_5, sin_5) = tables(rows, V32), tables(rows, GLM5)
    vectors = rows * HEADS
    values = torch.empty(vectors, HEAD_DIM, device="cuda", dtype=torch.float8_e4m3fn)
    scale = torch.empty(vectors, device="cuda")
    to = torch.arange(vectors, device="cuda")
    bf16, fp8, table = vectors * HEAD_DIM * 2, vectors * (HEAD_DIM + 4), 2 * cos.numel() * 4
    with_k = 2 * bf16 + 4 * k.numel() + table
    return {
        "rope, q and k, neox": (lambda: separate.rope(q, k, cos, sin, V32), with_k),
        "rope, q and k, interleaved": (lambda: separate.rope(q, k, cos_5, sin_5, GLM5), with_k),
        "rotation (Hadamard)": (lambda: separate.hadamard(q), 2 * bf16),
        "quantise_q": (lambda: separate.quantise_q(q), bf16 + fp8),
        "store_keys": (lambda: separate.store_keys(keys, values, scale, to), bf16 + fp8 + 8 * vectors),
        "fused q": (lambda: fused.q_rope_hadamard_quantise(q, cos, sin, V32), 2 * bf16 + fp8 + table),
        "fused q, interleaved": (lambda: fused.q_rope_hadamard_quantise(q, cos_5, sin_5, GLM5), 2 * bf16 + fp8 + table),
        "fused q, quantised only": (lambda: fused.q_rope_hadamard_quantise(q, cos, sin, V32, False), bf16 + fp8 + table),
    }


def gathers_at(rows: int) -> dict[str, tuple[Callable[[], Any], int]]:
    """Pad and re-range of as many keys, one head."""
    k = torch.randn(rows, HEAD_DIM, device="cuda").bfloat16()
    out = torch.empty_like(k)
    # Round-robin over eight ranks.
    source = torch.arange(rows, device="cuda") % 8 * (rows // 8) + torch.arange(rows, device="cuda") // 8
    return {
        "pad_rows": (lambda: pad_rows(k[:-1], out), 4 * k.numel()),
        "reorder": (lambda: reorder(k, source, out), 4 * k.numel() + 8 * rows),
    }


def projections_at(rows: int) -> dict[str, tuple[Callable[[], Any], int]]:
    """Of T keys."""
    g = torch.Generator("cuda").manual_seed(rows)
    x, weight = (torch.randn(n, V32.hidden, generator=g, device="cuda").bfloat16() for n in (rows, HEAD_DIM))
    moved_bytes = 2 * (x.numel() + weight.numel() + rows * HEAD_DIM)
    return {
        "project_key": (lambda: project_key(x, weight), moved_bytes),
        "F.linear of the same": (lambda: stages.project(x, weight), moved_bytes),
    }


def host_times() -> dict[str, float]:
    """us a call at 256 rows, beside an addition of torch's."""
    rows = 256
    q = torch.randn(rows, HEADS, HEAD_DIM, device="cuda").bfloat16()
    k = q[:, 0].contiguous()
    cos, sin = tables(rows, V32)
    weight, bias = torch.ones(HEAD_DIM, device="cuda"), torch.zeros(HEAD_DIM, device="cuda")
    x, proj, wk = (torch.randn(n, V32.hidden, device="cuda").bfloat16() for n in (rows, HEADS, HEAD_DIM))
    values, scale = separate.quantise_k(k)
    q_scale, to, out = torch.rand(rows, HEADS, device="cuda"), torch.arange(rows, device="cuda"), torch.empty_like(k)
    calls: dict[str, Callable[[], Any]] = {
        "torch's k + k": lambda: k + k,
        "project": lambda: stages.project(x, proj),
        "project_key": lambda: project_key(x, wk),
        "rope": lambda: separate.rope(q, k, cos, sin, V32),
        "rope_one": lambda: separate.rope_one(q, cos, sin, V32),
        "hadamard": lambda: separate.hadamard(q),
        "norm_k": lambda: separate.norm_k(k, weight, bias),
        "quantise_q": lambda: separate.quantise_q(q),
        "store_keys": lambda: separate.store_keys(k, values, scale, to),
        "head_gates": lambda: separate.head_gates(x, proj, q_scale, HEAD_DIM),
        "fused q": lambda: fused.q_rope_hadamard_quantise(q, cos, sin, V32),
        "fused k": lambda: fused.k_norm_rope_hadamard(k, weight, bias, cos, sin, V32),
        "pad_rows": lambda: pad_rows(k, out),
        "reorder": lambda: reorder(k, to, out),
        "write_paced": lambda: write_paced(k, out, 16, 1.0, 450.0),
        "sleep_us": lambda: sleep_us(1.0),
    }
    for call in calls.values():
        call()
    return {name: host_us(call) for name, call in calls.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    args = parser.parse_args()
    torch.backends.cuda.preferred_blas_library("cublaslt")  # as where the stages run
    flush = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device="cuda")
    empty_us = timed_us(lambda: sleep_us(0), flush)
    card = torch.cuda.get_device_name()
    print(
        f"{card}, torch {torch.__version__}; empty {empty_us:.1f} us\n{'stage':28}{'T':>8}{'us':>9}{'GB/s':>8}{'copy us':>9}{'share':>7}"
    )
    results = []
    for rows in args.rows:
        for name, (run, moved_bytes) in {**stages_at(rows), **projections_at(rows), **gathers_at(8 * rows)}.items():
            source = torch.empty(moved_bytes // 2, dtype=torch.uint8, device="cuda").random_()
            target = torch.empty_like(source)
            copy_us, us = timed_us(lambda t=target, s=source: t.copy_(s), flush), timed_us(run, flush)
            results.append(
                {"stage": name, "rows": rows, "us": us, "bytes": moved_bytes, "copy_us": copy_us, "share_of_copy": copy_us / us}
            )
            print(f"{name:28}{rows:8}{us:9.1f}{moved_bytes / us / 1e3:8.0f}{copy_us:9.1f}{copy_us / us:7.2f}", flush=True)
    host = host_times()
    print("host us a call:", ", ".join(f"{name} {us:.1f}" for name, us in host.items()))
    report = {"card": card, "torch": torch.__version__, "empty_us": empty_us, "stages": results, "host_us": host}
    args.out.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
