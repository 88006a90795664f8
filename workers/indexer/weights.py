"""The weights of one lightning indexer layer: seeded, or read from a checkpoint.

Legend: H heads, D head dim, X hidden, R q_lora rank.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from experiments.errors import SpecError
from experiments.spec.dims import DimsSpec

CHECKPOINT_BLOCK = 128
"""Rows and columns that share one scale in an fp8 checkpoint (DeepSeek-V3's block quantisation)."""


@dataclass(frozen=True)
class IndexerWeights:
    """One layer.

    Attributes:
        wq_b: bf16 [H*D, R].
        wk: bf16 [D, X].
        k_norm_weight, k_norm_bias: fp32 [D].
        weights_proj: bf16 [H, X].
    """

    wq_b: torch.Tensor
    wk: torch.Tensor
    k_norm_weight: torch.Tensor
    k_norm_bias: torch.Tensor
    weights_proj: torch.Tensor


def seeded_weights(dims: DimsSpec, seed: int) -> IndexerWeights:
    """Normal weights scaled by fan_in^-0.5; the same on every rank and device for a seed."""
    generator = torch.Generator().manual_seed(seed)

    def linear(out_features: int, in_features: int) -> torch.Tensor:
        return (torch.randn(out_features, in_features, generator=generator) / math.sqrt(in_features)).bfloat16()

    return IndexerWeights(
        wq_b=linear(dims.num_heads * dims.head_dim, dims.q_lora_rank),
        wk=linear(dims.head_dim, dims.hidden),
        k_norm_weight=1 + 0.1 * torch.randn(dims.head_dim, generator=generator),
        k_norm_bias=0.1 * torch.randn(dims.head_dim, generator=generator),
        weights_proj=linear(dims.num_heads, dims.hidden),
    )


def checkpoint_weights(folder: str, layer: int, dims: DimsSpec) -> IndexerWeights:
    """Layer `layer` of a checkpoint in DeepSeek-V3.2's layout, dequantised to bf16.

    Reads `model.layers.N.self_attn.indexer.{wq_b,wk,weights_proj}.weight` (with `.weight_scale_inv`, fp32 [rows/128, cols/128],
    beside an fp8 weight) and `k_norm.{weight,bias}` from the folder's *.safetensors.

    Raises:
        SpecError: No such folder or layer, a tensor is missing, or its shape is not the one of `dims`.
    """
    reader = _Reader(Path(folder), f"model.layers.{layer}.self_attn.indexer.")
    heads = dims.num_heads * dims.head_dim
    return IndexerWeights(
        wq_b=reader.linear("wq_b", (heads, dims.q_lora_rank)),
        wk=reader.linear("wk", (dims.head_dim, dims.hidden)),
        k_norm_weight=reader.tensor("k_norm.weight", (dims.head_dim,)).float(),
        k_norm_bias=reader.tensor("k_norm.bias", (dims.head_dim,)).float(),
        weights_proj=reader.linear("weights_proj", (dims.num_heads, dims.hidden)),
    )


class _Reader:
    """Tensors of one layer out of a checkpoint's files, by the names under a prefix."""

    def __init__(self, folder: Path, prefix: str) -> None:
        if not folder.is_dir():
            raise SpecError(f"weights.checkpoint: no folder at {str(folder)!r}")
        self.folder, self.prefix = folder, prefix
        self.file_of = self._index()
        if not any(name.startswith(prefix) for name in self.file_of):
            raise SpecError(f"weights.layer: {str(folder)!r} holds no tensors under {prefix!r}")

    def _index(self) -> dict[str, Path]:
        from safetensors import SafetensorError, safe_open

        index = self.folder / "model.safetensors.index.json"
        try:
            if index.is_file():
                weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
                outside = [file for file in weight_map.values() if Path(file).name != file]
                if outside:
                    raise SpecError(f"weights.checkpoint: {index.name} names a file outside its folder: {outside[0]!r}")
                return {name: self.folder / file for name, file in weight_map.items()}
            found = {}
            for file in sorted(self.folder.glob("*.safetensors")):
                with safe_open(file, framework="pt") as tensors:
                    found.update(dict.fromkeys(tensors.keys(), file))
            return found
        except (OSError, ValueError, KeyError, AttributeError, SafetensorError) as error:
            raise SpecError(f"weights.checkpoint: {str(self.folder)!r} cannot be read: {error}") from None

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        from safetensors import SafetensorError, safe_open

        full = self.prefix + name
        if full not in self.file_of:
            raise SpecError(f"weights.checkpoint: tensor {full!r} is missing")
        try:
            with safe_open(self.file_of[full], framework="pt") as tensors:
                value: torch.Tensor = tensors.get_tensor(full)
        except (OSError, SafetensorError) as error:
            raise SpecError(f"weights.checkpoint: {self.file_of[full].name} cannot be read: {error}") from None
        if tuple(value.shape) != shape:
            raise SpecError(f"weights.checkpoint: {full!r} has shape {list(value.shape)}; dims need {list(shape)}: change dims")
        return value

    def linear(self, name: str, shape: tuple[int, int]) -> torch.Tensor:
        weight = self.tensor(f"{name}.weight", shape)
        if weight.dtype is not torch.float8_e4m3fn:
            return weight.bfloat16()
        blocks = tuple(-(-size // CHECKPOINT_BLOCK) for size in shape)
        scale = self.tensor(f"{name}.weight_scale_inv", blocks).float()
        rows, columns = shape
        spread = scale.repeat_interleave(CHECKPOINT_BLOCK, 0)[:rows].repeat_interleave(CHECKPOINT_BLOCK, 1)[:, :columns]
        return (weight.float() * spread).bfloat16()
