"""The logits kernel against sums in float64, at sizes that fit no tile.

Legend: T query rows, N packed keys, H heads, D head dim.
"""

from __future__ import annotations

import time

import pytest
import torch

if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("the logits kernel needs a Hopper GPU", allow_module_level=True)

from workers.kernels.logits import mqa_logits, mqa_logits_into
from workers.kernels.nvrtc import Kernel
from workers.kernels.ops import FP8_SLACK
from workers.kernels.topk import topk_positions_into

pytestmark = pytest.mark.gpu

SIZES = [(1, 1), (1, 129), (3, 64), (5, 130), (64, 1000), (37, 777), (130, 2050), (1000, 33)]
HEADS = [64, 32]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator("cuda").manual_seed(seed)


def fp8(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(-448, 448).to(torch.float8_e4m3fn)


def integers(rows: int, keys: int, heads: int) -> tuple[torch.Tensor, ...]:
    """q8, k8, k_scale, gates whose every sum is a small integer."""
    g = generator()
    q = torch.randint(-4, 5, (rows, heads, 128), generator=g, device="cuda").float()
    k = torch.randint(-4, 5, (keys, 128), generator=g, device="cuda").float()
    gates = torch.randint(-3, 4, (rows, heads), generator=g, device="cuda").float()
    return fp8(q), fp8(k), torch.ones(keys, device="cuda"), gates


def normals(rows: int, keys: int, heads: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """q8, k8, k_scale, gates as quantisation leaves them."""
    g = generator(seed)
    q = torch.randn(rows, heads, 128, generator=g, device="cuda") * 120
    k = torch.randn(keys, 128, generator=g, device="cuda") * 120
    gates = torch.randn(rows, heads, generator=g, device="cuda") * 1e-3
    return fp8(q), fp8(k), torch.rand(keys, generator=g, device="cuda") + 0.5, gates


def ranges(rows: int, keys: int, *, is_causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """ks and ke: one causal sequence at the end of the keys, or any two numbers, some rows seeing nothing."""
    if is_causal:
        ke = (torch.arange(keys - rows + 1, keys + 1, device="cuda")).clamp(0, keys)
        return torch.zeros_like(ke, dtype=torch.int32), ke.int()
    ke = torch.randint(0, keys + 1, (rows,), generator=generator(1), device="cuda")
    ks = torch.randint(0, keys + 1, (rows,), generator=generator(2), device="cuda")
    return ks.int(), ke.int()


def reference(q: torch.Tensor, k: torch.Tensor, k_scale: torch.Tensor, gates: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits in float64 [T, N], and the magnitudes of what they are sums of."""
    dots = torch.einsum("thd,nd->thn", q.double(), k.double()).relu()
    exact = torch.einsum("thn,th->tn", dots, gates.double()) * k_scale.double()
    terms = torch.einsum("th,thd->td", gates.double().abs(), q.double().abs())
    return exact, terms @ k.double().abs().T * k_scale.double()


def visible(ks: torch.Tensor, ke: torch.Tensor, keys: int) -> torch.Tensor:
    n = torch.arange(keys, device="cuda")
    return (n >= ks[:, None]) & (n < ke[:, None])


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(("rows", "keys"), SIZES)
@pytest.mark.parametrize("is_causal", [True, False])
def test_integers_are_exact(rows, keys, heads, is_causal):
    inputs, (ks, ke) = integers(rows, keys, heads), ranges(rows, keys, is_causal=is_causal)
    out = torch.full((rows, keys), float("nan"), device="cuda")
    mqa_logits_into(*inputs, ks, ke, out, 0)
    seen = visible(ks, ke, keys)
    assert torch.equal(out.double()[seen], reference(*inputs)[0][seen])


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(("rows", "keys"), SIZES)
def test_random_logits_keep_to_the_stated_slack(rows, keys, heads):
    inputs, (ks, ke) = normals(rows, keys, heads), ranges(rows, keys, is_causal=True)
    exact, magnitude = reference(*inputs)
    off = (mqa_logits(*inputs, ks, ke).double() - exact).abs()[visible(ks, ke, keys)]
    assert bool((off <= FP8_SLACK * magnitude[visible(ks, ke, keys)]).all())


def test_a_row_keeps_its_bits_wherever_it_stands():
    """In other company, at another place in the tile, on other SMs: a split changes no score."""
    rows, keys = 70, 900
    q, k, k_scale, gates = normals(rows, keys, 64)
    ks, ke = torch.zeros(rows, dtype=torch.int32, device="cuda"), torch.full((rows,), keys, dtype=torch.int32, device="cuda")
    whole = mqa_logits(q, k, k_scale, gates, ks, ke)
    assert torch.equal(whole, mqa_logits(q, k, k_scale, gates, ks, ke))
    order = torch.randperm(rows, generator=generator(3), device="cuda")[:37]
    some = mqa_logits(q.view(torch.uint8)[order].view(q.dtype), k, k_scale, gates[order], ks[order], ke[order], num_sms=5)
    assert torch.equal(some, whole[order])
    keys_order = torch.randperm(keys, generator=generator(4), device="cuda")
    shuffled = mqa_logits(q, k.view(torch.uint8)[keys_order].view(k.dtype), k_scale[keys_order], gates, ks, ke)
    assert torch.equal(shuffled, whole[:, keys_order])


def test_nothing_is_written_past_the_keys_or_the_rows():
    rows, keys = 6, 200
    inputs, (ks, ke) = normals(rows, keys, 64), ranges(rows, keys, is_causal=True)
    buffer = torch.full((rows + 2, keys + 56), -7.0, device="cuda")
    mqa_logits_into(*inputs, ks, ke, buffer[:rows, :keys], 0)
    assert bool((buffer[rows:] == -7).all())
    assert bool((buffer[:, keys:] == -7).all())


def test_offsets_past_two_to_the_31():
    rows, keys = 20, 1 << 27
    q, _, _, gates = normals(rows, 1, 64)
    k_scale = torch.zeros(keys, device="cuda")
    k = torch.zeros(keys, 128, dtype=torch.uint8, device="cuda").view(torch.float8_e4m3fn)
    tail = normals(1, 40, 64, seed=5)
    k.view(torch.uint8)[-40:], k_scale[-40:] = tail[1].view(torch.uint8), tail[2]
    ke = torch.full((rows,), keys, dtype=torch.int32, device="cuda")
    got = mqa_logits(q, k, k_scale, gates, ke - 40, ke)[:, -40:]
    assert torch.equal(got, mqa_logits(q, tail[1], tail[2], gates, torch.zeros_like(ke), torch.full_like(ke, 40)))


@pytest.mark.parametrize("rows_keys", [(0, 5), (5, 0)])
def test_no_rows_or_no_keys(rows_keys):
    rows, keys = rows_keys
    none = torch.zeros(rows, dtype=torch.int32, device="cuda")
    assert mqa_logits(*normals(rows, keys, 64), none, none).shape == rows_keys


def test_a_shape_that_the_kernel_lacks_is_refused():
    none = torch.zeros(2, dtype=torch.int32, device="cuda")
    with pytest.raises(ValueError, match="16 heads of 128"):
        mqa_logits(*normals(2, 3, 16), none, none)


WHOLE_SMS = 'extern "C" __global__ void fill(int* x) { extern __shared__ int s[]; s[0] = 1; x[blockIdx.x] = s[0]; }'
"""Its blocks take more than half of an SM's shared memory: none fits beside a block of our kernels."""


@pytest.mark.parametrize("left", [0, 16])
@pytest.mark.parametrize("stage", ["logits", "top-k"])
def test_sms_that_are_left_are_free(stage, left):
    """As many blocks as SMs are left run at once; where none is left, they wait until our kernel ends."""
    num_sms = torch.cuda.get_device_properties().multi_processor_count - left
    rows, keys = 16384, 65536
    q, k, k_scale, gates = normals(rows, keys, 64)
    ks, ke = torch.zeros(rows, dtype=torch.int32, device="cuda"), torch.full((rows,), keys, dtype=torch.int32, device="cuda")
    out, x = torch.empty(rows, keys, device="cuda"), torch.zeros(16, dtype=torch.int32, device="cuda")
    indices = torch.empty(rows, 2048, dtype=torch.int32, device="cuda")
    other, fill = torch.cuda.Stream(), Kernel("fill", WHOLE_SMS, (), 32, 120 << 10, ("Q",))
    for _ in range(2):  # the first compiles
        begin, end, fill_end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        mqa_logits_into(q, k, k_scale, gates, ks, ke, out, num_sms)
        torch.cuda.synchronize()
        begin.record()
        if stage == "logits":
            mqa_logits_into(q, k, k_scale, gates, ks, ke, out, num_sms)
        else:
            topk_positions_into(out, ks, ke, indices, num_sms)
        end.record()
        time.sleep(5e-4)  # ours takes milliseconds
        with torch.cuda.stream(other):
            fill.launch(x.device, 16, x.data_ptr())
            fill_end.record()
        torch.cuda.synchronize()
    share = begin.elapsed_time(fill_end) / begin.elapsed_time(end)
    assert share < 0.6 if left else share > 0.9
