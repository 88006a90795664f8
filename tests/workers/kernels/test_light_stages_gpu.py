"""Every light stage on a CUDA device against the same stage on a CPU: the same bits where they are promised.

Legend: T rows, H heads, D head dim, S rows to store or to gather, N rows of a cache or a gathered buffer.
"""

from __future__ import annotations

import math

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
pytest.importorskip("triton", reason="the light stages need Triton")

from experiments.spec.dims import PRESETS, DimsSpec
from workers.indexer import stages
from workers.indexer.ops import TorchOps
from workers.indexer.rope import RotaryTable, apply_rope
from workers.kernels import fused, separate

pytestmark = pytest.mark.gpu

V32, GLM5 = PRESETS["deepseek_v32"], PRESETS["glm_5"]
BOTH_STYLES = pytest.mark.parametrize("dims", [V32, GLM5], ids=["neox", "interleaved"])
SIZES = pytest.mark.parametrize(("rows", "heads"), [(0, 64), (1, 64), (1, 32), (7, 32), (133, 64), (1100, 32)])
"""None, one, fewer than a tile, many; the last is no multiple of a tile for k."""


def hard_values(rows: int, heads: int, seed: int = 0) -> torch.Tensor:
    """bf16 [T, H, D] on the device: normal values over many magnitudes, zeros of both signs, powers of two, single spikes."""
    g = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(rows, heads, 128, generator=g, device="cuda")
    x *= 2.0 ** torch.randint(-12, 8, (rows, heads, 1), generator=g, device="cuda")
    kind = torch.randint(0, 8, (rows, heads, 1), generator=g, device="cuda")
    power = 2.0 ** torch.randint(-16, 12, (rows, heads, 128), generator=g, device="cuda")
    spike = torch.zeros_like(x)
    spike[..., 77] = 448 * 2.0**-3
    x = torch.where(kind == 0, 0.0, torch.where(kind == 1, -0.0, torch.where(kind == 2, power, torch.where(kind == 3, spike, x))))
    return x.bfloat16()


def tables(rows: int, dims: DimsSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of positions up to 100,000, made on the CPU: other devices' cosines have other last bits."""
    cos, sin = RotaryTable(dims).cos_sin(torch.arange(rows) * 91 % 100_003)
    return cos.cuda(), sin.cuda()


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.cpu().contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])


def assert_same_bits(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.dtype == expected.dtype and got.shape == expected.shape
    differ = (bits(got) != bits(expected)).nonzero()
    assert differ.numel() == 0, f"{differ.shape[0]} of {got.numel()} differ, first at {differ[0].tolist()}"


def steps_apart(a: torch.Tensor, b: torch.Tensor) -> int:
    """The most bf16 values that lie between two of them."""
    order = [torch.where(bits(x) < 0, -32768 - bits(x).int(), bits(x).int()) for x in (a, b)]
    return int((order[0] - order[1]).abs().max()) if a.numel() else 0


@SIZES
@BOTH_STYLES
def test_rope_has_the_bits_of_the_reference(rows, heads, dims):
    q, k = hard_values(rows, heads), hard_values(rows, 1, seed=1)[:, 0].contiguous()
    cos, sin = tables(rows, dims)
    q_out, k_out = separate.rope(q, k, cos, sin, dims)
    q_ref, k_ref = (apply_rope(x.cpu(), cos.cpu(), sin.cpu(), dims) for x in (q, k))
    assert_same_bits(q_out, q_ref)
    assert_same_bits(k_out, k_ref)
    assert_same_bits(separate.rope_one(q, cos, sin, dims), q_ref)
    assert_same_bits(separate.rope_one(k, cos, sin, dims), k_ref)


@SIZES
def test_hadamard_has_the_bits_of_the_reference(rows, heads):
    q = hard_values(rows, heads)
    assert_same_bits(separate.hadamard(q), stages.hadamard(q.cpu()))
    assert_same_bits(separate.hadamard(q[:, 0].contiguous()), stages.hadamard(q[:, 0].cpu()))


@SIZES
def test_quantised_values_and_scales_have_the_bits_of_the_reference(rows, heads):
    q = hard_values(rows, heads)
    for got, expected in zip(separate.quantise_q(q), stages.quantise_q(q.cpu()), strict=True):
        assert_same_bits(got, expected)
    k = q[:, 0].contiguous()
    for got, expected in zip(separate.quantise_k(k), stages.quantise_k(k.cpu()), strict=True):
        assert_same_bits(got, expected)


@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("rows", [0, 1, 7, 1100])
def test_stored_keys_are_the_quantised_ones_in_their_rows_and_no_other_row_changes(rows, index_dtype):
    k = hard_values(rows, 1)[:, 0].contiguous()
    to = torch.randperm(2 * rows + 3, generator=torch.Generator().manual_seed(3))[:rows]
    values, scale = torch.full((2 * rows + 3, 128), 3.0).to(torch.float8_e4m3fn), torch.full((2 * rows + 3,), 5.0)
    values_gpu, scale_gpu = values.cuda(), scale.cuda()
    separate.store_keys(k, values_gpu, scale_gpu, to.to(index_dtype).cuda())
    k8, k_scale = stages.quantise_k(k.cpu())
    values.view(torch.uint8)[to], scale[to] = k8.view(torch.uint8), k_scale
    assert_same_bits(values_gpu, values)
    assert_same_bits(scale_gpu, scale)


@pytest.mark.parametrize("rows", [0, 1, 7, 1100])
def test_packed_keys_are_the_same_quantised_rows_on_either_side_of_a_wire(rows):
    k = hard_values(rows, 1)[:, 0].contiguous()
    packed = separate.pack_keys(k)
    assert_same_bits(packed, TorchOps().pack_keys(k.cpu()))
    to = torch.randperm(2 * rows + 3)[:rows].cuda()
    values, scale = (
        torch.zeros(2 * rows + 3, 128, device="cuda").to(torch.float8_e4m3fn),
        torch.zeros(2 * rows + 3, device="cuda"),
    )
    wanted_values, wanted_scale = values.clone(), scale.clone()
    separate.unpack_keys(packed, values, scale, to)
    separate.store_keys(k, wanted_values, wanted_scale, to)
    assert_same_bits(values, wanted_values.cpu())
    assert_same_bits(scale, wanted_scale.cpu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 7, 1100])
def test_layer_norm_is_within_one_step_of_the_reference(rows, dtype):
    g = torch.Generator("cuda").manual_seed(rows)
    k = (torch.randn(rows, 128, generator=g, device="cuda") + 0.3).bfloat16()
    weight, bias = (torch.randn(128, generator=g, device="cuda").to(dtype) for _ in range(2))
    expected = stages.norm_k(k.cpu(), weight.float().cpu(), bias.float().cpu())
    got = separate.norm_k(k, weight, bias)
    # Next to zero, where weight x + bias cancels, a step of bf16 is less than fp32's rounding.
    is_near = bool(((got.cpu().float() - expected.float()).abs() <= 2**-20).all())
    assert steps_apart(got, expected) <= 1 or is_near
    assert_same_bits(separate.norm_k(k, weight, bias), got.cpu())


def test_layer_norm_of_a_constant_row_is_the_bias():
    bias = torch.randn(128, device="cuda").bfloat16()
    got = separate.norm_k(torch.full((3, 128), 2.5, device="cuda").bfloat16(), torch.randn(128, device="cuda"), bias.float())
    assert_same_bits(got, bias.expand(3, 128).cpu())


@pytest.mark.parametrize("heads", [64, 32])
@pytest.mark.parametrize("rows", [0, 1, 133])
def test_head_gates_are_within_the_rounding_of_an_fp32_sum(rows, heads):
    g = torch.Generator("cuda").manual_seed(rows)
    x = torch.randn(rows, 7168, generator=g, device="cuda").bfloat16()
    weights = (torch.randn(heads, 7168, generator=g, device="cuda") / 85).bfloat16()
    q_scale = 2.0 ** torch.randint(-12, 0, (rows, heads), generator=g, device="cuda")
    got = separate.head_gates(x, weights, q_scale, 128)
    assert got.dtype == torch.float32 and got.shape == (rows, heads)
    factor = q_scale.double() / math.sqrt(heads) / math.sqrt(128)
    error = (got - x.double() @ weights.double().T * factor).abs()
    assert bool((error <= 2**-20 * (x.double().abs() @ weights.double().abs().T) * factor).all())
    assert_same_bits(separate.head_gates(x, weights, q_scale, 128), got.cpu())


def test_head_gates_of_integers_are_exact():
    x, weights = torch.full((5, 256), 2.0).bfloat16(), torch.full((64, 256), 3.0).bfloat16()
    q_scale = 2.0 ** torch.arange(-160, 160).view(5, 64).clamp(-20, 20)
    expected = stages.head_gates(x, weights, q_scale, 128)
    assert_same_bits(separate.head_gates(x.cuda(), weights.cuda(), q_scale.cuda(), 128), expected)


@SIZES
@BOTH_STYLES
def test_fused_q_has_the_bits_of_the_separate_stages(rows, heads, dims):
    q = hard_values(rows, heads)
    cos, sin = tables(rows, dims)
    rotated, values, scale = fused.q_rope_hadamard_quantise(q, cos, sin, dims)
    expected = stages.hadamard(apply_rope(q.cpu(), cos.cpu(), sin.cpu(), dims))
    assert_same_bits(rotated, expected)
    for got, ref in zip((values, scale), stages.quantise_q(expected), strict=True):
        assert_same_bits(got, ref)
    unwritten, *same = fused.q_rope_hadamard_quantise(q, cos, sin, dims, write_rotated=False)
    assert unwritten.numel() == 0
    for got, ref in zip(same, (values, scale), strict=True):
        assert_same_bits(got, ref.cpu())


@BOTH_STYLES
@pytest.mark.parametrize("rows", [0, 1, 7, 1100])
def test_fused_k_has_the_bits_of_the_separate_stages(rows, dims):
    g = torch.Generator("cuda").manual_seed(rows)
    k = torch.randn(rows, 128, generator=g, device="cuda").bfloat16()
    weight, bias = (torch.randn(128, generator=g, device="cuda") for _ in range(2))
    cos, sin = tables(rows, dims)
    normed = separate.norm_k(k, weight, bias)
    expected = stages.hadamard(apply_rope(normed.cpu(), cos.cpu(), sin.cpu(), dims))
    assert_same_bits(fused.k_norm_rope_hadamard(k, weight, bias, cos, sin, dims), expected)


def test_a_rows_bits_do_not_depend_on_the_number_of_rows():
    """Every split must give a token the same key."""
    k = hard_values(600, 1)[:, 0].contiguous()
    k[:, 0] += 1  # no constant rows
    weight, bias = (torch.randn(128, device="cuda") for _ in range(2))
    cos, sin = tables(600, V32)
    whole = fused.k_norm_rope_hadamard(k, weight, bias, cos, sin, V32)
    part = slice(13, 24)
    assert_same_bits(fused.k_norm_rope_hadamard(k[part], weight, bias, cos[part], sin[part], V32), whole[part].cpu())


def test_a_captured_graph_replays_on_new_values():
    q, (cos, sin) = hard_values(64, 64), tables(64, V32)
    fused.q_rope_hadamard_quantise(q, cos, sin, V32)  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = fused.q_rope_hadamard_quantise(q, cos, sin, V32)
    q.copy_(hard_values(64, 64, seed=9))
    graph.replay()
    torch.cuda.synchronize()
    for got, expected in zip(outputs, fused.q_rope_hadamard_quantise(q, cos, sin, V32), strict=True):
        assert_same_bits(got, expected.cpu())


@pytest.mark.parametrize(
    "x",
    [torch.zeros(4, 128), torch.zeros(4, 64).bfloat16(), torch.zeros(128, 128).bfloat16().T],
    ids=["fp32", "64 dims", "transposed"],
)
def test_what_the_kernels_do_not_read_is_refused(x):
    with pytest.raises(ValueError, match="wants contiguous bf16"):
        separate.hadamard(x.cuda())


def test_another_rope_dim_is_refused():
    q, (cos, sin) = hard_values(2, 64), tables(2, V32)
    with pytest.raises(ValueError, match="rope_dim 32"):
        separate.rope_one(q, cos, sin, V32.model_copy(update={"rope_dim": 32}))
