"""Weights come seeded, or from a checkpoint that the test writes in DeepSeek-V3.2's layout."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from experiments.errors import SpecError
from experiments.spec.dims import DimsSpec
from experiments.spec.experiment import ExperimentSpec
from experiments.spec.weights import WeightsSpec
from service.run.sweep import check
from tests.conftest import make_cell
from tests.workers.asking import faults, prepare
from workers.indexer.weights import checkpoint_weights, seeded_weights

DIMS = DimsSpec(name="small", hidden=300, q_lora_rank=130, num_heads=3, topk=8, num_layers=2)
PREFIX = "model.layers.3.self_attn.indexer."


def quantise_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """fp8 values and one scale for each 128 x 128 block."""
    rows, columns = weight.shape
    scale = torch.zeros(-(-rows // 128), -(-columns // 128))
    values = torch.zeros_like(weight).to(torch.float8_e4m3fn)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            block = weight[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128].float()
            scale[i, j] = block.abs().max() / 448
            values.view(torch.uint8)[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128] = (
                (block / scale[i, j]).to(torch.float8_e4m3fn).view(torch.uint8)
            )
    return values, scale


@pytest.fixture
def checkpoint(tmp_path):
    weights = seeded_weights(DIMS, 5)
    first, second = {}, {}
    for name in ("wq_b", "wk"):
        values, scale = quantise_blocks(getattr(weights, name))
        first[f"{PREFIX}{name}.weight"], first[f"{PREFIX}{name}.weight_scale_inv"] = values, scale
    second[f"{PREFIX}weights_proj.weight"] = weights.weights_proj
    second[f"{PREFIX}k_norm.weight"], second[f"{PREFIX}k_norm.bias"] = weights.k_norm_weight, weights.k_norm_bias
    save_file(first, tmp_path / "model-00001.safetensors")
    save_file(second, tmp_path / "model-00002.safetensors")
    files = dict.fromkeys(first, "model-00001.safetensors") | dict.fromkeys(second, "model-00002.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return tmp_path


@pytest.mark.parametrize("indexed", [True, False])
def test_a_checkpoint_is_dequantised_block_by_block(checkpoint, indexed):
    if not indexed:
        (checkpoint / "model.safetensors.index.json").unlink()
    wanted, found = seeded_weights(DIMS, 5), checkpoint_weights(str(checkpoint), 3, DIMS)
    assert found.wq_b.dtype is torch.bfloat16
    for name in ("wq_b", "wk"):
        error = (getattr(found, name).float() - getattr(wanted, name).float()).abs()
        assert float(error.max()) <= float(getattr(wanted, name).float().abs().max()) * 2**-4
        assert float(error.mean()) < 0.01 * 3
    assert torch.equal(found.weights_proj, wanted.weights_proj)
    assert torch.equal(found.k_norm_bias, wanted.k_norm_bias)


def test_ranks_run_on_a_checkpoint(pair, checkpoint):
    prepare(pair, make_cell(dims=DIMS), weights=WeightsSpec(checkpoint=str(checkpoint), layer=3))
    assert faults(pair) == []


def with_another_layer(checkpoint, seed):
    """Layer 4 beside the fixture's layer 3, in files without an index."""
    weights = seeded_weights(DIMS, seed)
    tensors = {f"{name}.weight": getattr(weights, name) for name in ("wq_b", "wk", "weights_proj")}
    tensors |= {"k_norm.weight": weights.k_norm_weight, "k_norm.bias": weights.k_norm_bias}
    save_file({f"{PREFIX.replace('3', '4')}{name}": t for name, t in tensors.items()}, checkpoint / "model-00003.safetensors")
    (checkpoint / "model.safetensors.index.json").unlink()


def test_a_chain_runs_on_the_layers_that_follow(pair, checkpoint):
    with_another_layer(checkpoint, 6)
    request = WeightsSpec(checkpoint=str(checkpoint), layer=3)
    prepare(pair, make_cell(dims=DIMS, layers=2), weights=request)
    assert faults(pair) == []


def test_a_chain_beyond_the_checkpoint_is_refused_before_anything_starts(checkpoint):
    values = {
        "name": "chained",
        "dims": DIMS.model_dump(),
        "workload": {"kind": "grid", "new_tokens": 64},
        "cells": {"cp_size": 2, "fabric": "process_group", "regime": "streaming"},
        "arms": {"baseline": {}, "overlapped": {"schedule": "overlap_rotate"}},
        "weights": {"checkpoint": str(checkpoint), "layer": 3},
        "chain": {"layers": 2},
    }
    with pytest.raises(SpecError, match=r"weights\.layer.*layers\.4"):
        check(ExperimentSpec.model_validate(values))
    with_another_layer(checkpoint, 6)
    assert len(check(ExperimentSpec.model_validate(values)).cells) == 1


def test_missing_things_are_named(checkpoint, tmp_path):
    with pytest.raises(SpecError, match=r"weights.layer.*layers.7"):
        checkpoint_weights(str(checkpoint), 7, DIMS)
    with pytest.raises(SpecError, match="no folder"):
        checkpoint_weights(str(tmp_path / "nowhere"), 3, DIMS)
    with pytest.raises(SpecError, match=r"has shape \[128, 300\]; dims need \[128, 64\]"):
        checkpoint_weights(str(checkpoint), 3, DIMS.model_copy(update={"hidden": 64}))


def test_a_broken_file_is_named(checkpoint):
    (checkpoint / "model-00001.safetensors").write_bytes(b"not tensors")
    with pytest.raises(SpecError, match="model-00001"):
        checkpoint_weights(str(checkpoint), 3, DIMS)


def test_an_index_cannot_lead_outside_its_folder(checkpoint):
    index = checkpoint / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {f"{PREFIX}wk.weight": "../elsewhere.safetensors"}}))
    with pytest.raises(SpecError, match="outside"):
        checkpoint_weights(str(checkpoint), 3, DIMS)


def test_seeds_make_weights():
    assert torch.equal(seeded_weights(DIMS, 1).wk, seeded_weights(DIMS, 1).wk)
    assert not torch.equal(seeded_weights(DIMS, 1).wk, seeded_weights(DIMS, 2).wk)
