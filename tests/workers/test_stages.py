"""Each stage keeps its exact rule."""

from __future__ import annotations

import pytest
import torch

from experiments.spec.dims import PRESETS, DimsSpec
from workers.indexer import stages
from workers.indexer.rope import RotaryTable, apply_rope, inverse_frequencies

V32 = PRESETS["deepseek_v32"]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.parametrize("capability", ["AVX512", "AVX2"])
def test_a_projection_is_summed_in_fp32_and_rounded_once_whatever_the_cpu(monkeypatch, capability):
    monkeypatch.setattr(stages, "has_bf16_products", lambda: capability == "AVX512")
    x, weight = randn(33, 512), randn(48, 512, seed=1)
    exact = x.double() @ weight.double().T
    made = stages.project(x, weight)
    assert made.dtype == torch.bfloat16
    # Half a step of bf16, and what 512 sums in fp32 may add in the wrong order.
    slack = x.double().abs() @ weight.double().abs().T * 512 * 2**-24
    assert bool(((made.double() - exact).abs() <= exact.abs() * 2**-8 + slack).all())


def test_rope_turns_only_the_first_64_dims():
    x = randn(5, 3, 128)
    cos, sin = RotaryTable(V32).cos_sin(torch.arange(100, 105))
    y = apply_rope(x, cos, sin, V32)
    assert torch.equal(y[..., 64:], x[..., 64:])
    assert not torch.equal(y[..., :64], x[..., :64])


def test_rope_at_position_zero_is_the_identity():
    x = randn(1, 128)
    assert torch.equal(apply_rope(x, *RotaryTable(V32).cos_sin(torch.tensor([0])), V32), x)


def test_the_two_rope_styles_differ_and_agree_after_reordering():
    interleaved = V32.model_copy(update={"rope_style": "interleaved"})
    x = randn(4, 128)
    tables = RotaryTable(V32).cos_sin(torch.arange(1, 5))
    neox, pairs = apply_rope(x, *tables, V32), apply_rope(x, *tables, interleaved)
    assert not torch.equal(neox, pairs)
    order = torch.arange(64).view(2, 32).T.reshape(-1)
    shuffled = x.clone()
    shuffled[:, :64] = x[:, order]
    assert torch.equal(apply_rope(shuffled, *tables, interleaved)[:, :64], neox[:, order])


def test_rope_travels_with_the_tokens():
    """RoPE after the split is RoPE before it: positions are the tokens' global ones."""
    x, positions, rows = randn(20, 128), torch.arange(50, 70), torch.tensor([3, 17, 4])
    table = RotaryTable(V32)
    whole = apply_rope(x, *table.cos_sin(positions), V32)
    assert torch.equal(apply_rope(x[rows], *table.cos_sin(positions[rows]), V32), whole[rows])


def test_yarn_keeps_fast_dims_and_slows_slow_ones():
    plain = inverse_frequencies(V32.model_copy(update={"yarn": None}))
    yarn = inverse_frequencies(V32)
    assert torch.equal(yarn[:8], plain[:8])
    assert torch.allclose(yarn[-4:], plain[-4:] / 40)
    assert bool((yarn <= plain).all())


def test_hadamard_is_orthonormal_and_its_own_inverse():
    x = randn(7, 3, 128)
    y = stages.hadamard(x)
    assert torch.allclose(stages.hadamard(y).float(), x.float(), atol=0.05)
    assert torch.allclose((y.float() ** 2).sum(-1), (x.float() ** 2).sum(-1), rtol=0.02)
    one = torch.zeros(1, 128, dtype=torch.bfloat16)
    one[0, 0] = 1
    assert torch.allclose(stages.hadamard(one).float(), torch.full((1, 128), 128**-0.5), rtol=0.01)


def test_hadamard_keeps_dot_products():
    """Why q and k may both be rotated: their scores stay."""
    q, k = randn(40, 128, seed=1), randn(50, 128, seed=2)
    before = q.double() @ k.double().T
    after = stages.hadamard(q).double() @ stages.hadamard(k).double().T
    # Two roundings to bf16 of 128 terms: 2^-9 of the lengths each, at most.
    lengths = q.double().norm(dim=1)[:, None] * k.double().norm(dim=1)
    assert bool(((after - before).abs() <= 2**-8 * lengths).all())


def test_hadamard_bits_do_not_depend_on_the_number_of_rows():
    x = randn(33, 128)
    assert torch.equal(stages.hadamard(x)[5:6], stages.hadamard(x[5:6]))


def test_layernorm_is_taken_in_fp32():
    k, weight, bias = randn(4, 128) * 30, torch.rand(128) + 0.5, torch.randn(128)
    wide = k.double()
    exact = (wide - wide.mean(-1, keepdim=True)) / (wide.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt() * weight + bias
    assert torch.allclose(stages.norm_k(k, weight, bias).double(), exact, rtol=2**-8, atol=1e-5)


def test_the_scale_of_q_is_the_power_of_two_at_or_above():
    q = torch.zeros(6, 1, 128)
    for row, amax in enumerate([448.0, 448.5, 896.0, 1.0, 0.0, 3.5]):
        q[row, 0, row] = amax
    values, scale = stages.quantise_q(q)
    assert scale[:, 0].tolist() == [1.0, 2.0, 2.0, 2.0**-8, 2.0**-22, 2.0**-7]
    assert float(values.float().abs().max()) <= 448


def test_scales_of_q_are_powers_of_two_that_use_the_range():
    q = randn(300, 4, 128) * torch.exp2(torch.arange(300.0) / 10 - 12)[:, None, None]
    values, scale = stages.quantise_q(q)
    mantissa, _ = torch.frexp(scale)
    assert bool((mantissa == 0.5).all())
    largest = values.float().abs().amax(-1)
    assert bool((largest <= 448).all())
    assert bool((largest >= 224)[q.abs().amax(-1) > 1e-4].all())


def test_the_scale_of_k_is_plain():
    k = randn(9, 128)
    k[4] = 0
    values, scale = stages.quantise_k(k)
    assert torch.equal(scale, k.float().abs().amax(-1).clamp_min(1e-4) / 448)
    assert float(scale[4]) == pytest.approx(1e-4 / 448)
    assert torch.equal(values[4].float(), torch.zeros(128))
    restored = values.float() * scale[:, None]
    assert torch.allclose(restored, k.float(), rtol=2**-4, atol=float(scale.max()) * 0.01)


def test_top_k_is_canonical_masked_and_padded():
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0, 9.0], [5.0, 5.0, 5.0, 5.0, 5.0]])
    ks, ke = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([4, 3], dtype=torch.int32)
    masked = logits.masked_fill(~((torch.arange(5) >= ks[:, None]) & (torch.arange(5) < ke[:, None])), float("-inf"))
    assert stages.topk_positions(masked, ks, ke, 3).tolist() == [[1, 2, 3], [0, 1, -1]]


def test_short_rows_select_everything():
    ks, ke = torch.zeros(3, dtype=torch.int32), torch.tensor([1, 2, 3], dtype=torch.int32)
    logits = torch.randn(3, 3).masked_fill(torch.arange(3) >= ke[:, None], float("-inf"))
    chosen = stages.topk_positions(logits, ks, ke, 4)
    assert [sorted(row) for row in chosen.tolist()] == [[-1, -1, -1, 0], [-1, -1, 0, 1], [-1, 0, 1, 2]]


@pytest.mark.parametrize("logits_mib", [1, 2, 64])
def test_chunks_bound_memory_and_change_no_selection(logits_mib):
    torch.manual_seed(0)
    heads, keys, rows = 64, 700, 90
    q8, _ = stages.quantise_q(torch.randn(rows, heads, 128))
    k8, k_scale = stages.quantise_k(torch.randn(keys, 128))
    gates = torch.rand(rows, heads)
    ks, ke = torch.zeros(rows, dtype=torch.int32), torch.arange(keys - rows + 1, keys + 1, dtype=torch.int32)
    whole = stages.topk_positions(stages.mqa_logits(q8, k8, k_scale, gates, ks, ke), ks, ke, 32)
    chunks = stages.row_ranges(ke, keys, stages.bytes_per_logit(heads), logits_mib)
    assert torch.equal(stages.select(q8, k8, k_scale, gates, ks, ke, 32, chunks).sort(1).values, whole.sort(1).values)
    assert [row for r in chunks for row in range(r.start, r.end)] == list(range(rows))
    assert [r.num_keys for r in chunks] == [int(ke[r.end - 1]) for r in chunks]
    assert all(r.end == r.start + 1 or (r.end - r.start) * keys * (heads + 2) * 4 <= logits_mib * 2**20 for r in chunks)


def test_two_calls_of_zigzag_are_one_call_with_ranges():
    """SGLang's in-seq-split calls logits and top-k once for prev and once for next rows; ranges a row say the same."""
    torch.manual_seed(1)
    k8, k_scale = stages.quantise_k(torch.randn(64, 128))
    q8, _ = stages.quantise_q(torch.randn(16, 4, 128))
    gates = torch.rand(16, 4)
    positions = torch.cat([torch.arange(8, 16), torch.arange(48, 56)])
    ks, ke = torch.zeros(16, dtype=torch.int32), (positions + 1).to(torch.int32)
    one = stages.select(q8, k8, k_scale, gates, ks, ke, 8, (stages.RowRange(0, 16, 64),))
    half = (stages.RowRange(0, 8, 16),)
    prev = stages.select(q8[:8], k8[:16], k_scale[:16], gates[:8], ks[:8], ke[:8], 8, half)
    following = stages.select(q8[8:], k8[:56], k_scale[:56], gates[8:], ks[8:], ke[8:], 8, (stages.RowRange(0, 8, 56),))
    assert torch.equal(one.sort(1).values, torch.cat([prev, following]).sort(1).values)


def test_presets_are_the_published_shapes():
    assert (V32.hidden, V32.q_lora_rank, V32.num_heads, V32.topk, V32.num_layers) == (7168, 1536, 64, 2048, 61)
    glm = PRESETS["glm_5"]
    assert (glm.num_heads, glm.rope_style, glm.rope_theta, glm.yarn) == (32, "interleaved", 8e6, None)
    assert isinstance(PRESETS["mini"], DimsSpec)


def test_frequencies_are_those_of_the_reference_to_the_last_bit():
    """At position 1e5 one bit of a frequency is 0.009 rad, which moves selections."""
    from workers.indexer import reference

    for dims in PRESETS.values():
        assert torch.equal(inverse_frequencies(dims), reference.inverse_frequencies(dims).float())
