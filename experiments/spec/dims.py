"""The shapes of one lightning indexer, and its position encoding.

Sources: DeepSeek-V3.2-Exp `inference/config_671B_v3.2.json` and SGLang `dsa_indexer.py` (constants of `deepseek_v32`);
GLM-5's `config.json` (constants of `glm_5`).
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from experiments.errors import unknown_name

CACHE_BYTES_PER_TOKEN = 132
"""128 B of fp8 values and one fp32 scale."""


class YarnSpec(BaseModel):
    """YaRN's frequency correction (Peng et al., 2023, section 3.2), with DeepSeek's parameter names."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    factor: float = Field(40.0, gt=1)
    original_positions: int = Field(4096, gt=0)
    beta_fast: float = Field(32.0, gt=0)
    beta_slow: float = Field(1.0, gt=0)


class DimsSpec(BaseModel):
    """Shapes of one indexer layer; `num_layers` only scales per-layer figures to a model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    hidden: int = Field(gt=0)
    q_lora_rank: int = Field(gt=0)
    num_heads: int = Field(gt=0)
    head_dim: Literal[128] = 128
    rope_dim: int = Field(64, gt=0)
    topk: int = Field(2048, gt=0)
    num_layers: int = Field(gt=0)
    rope_style: Literal["neox", "interleaved"] = "neox"
    """neox: dim i pairs with i + rope_dim/2; interleaved: 2i with 2i+1."""
    rope_theta: float = Field(10000.0, gt=0)
    yarn: YarnSpec | None = None
    cache_page_tokens: int = Field(64, gt=0)

    @model_validator(mode="after")
    def _rope_fits(self) -> DimsSpec:
        if self.rope_dim % 2 or self.rope_dim > self.head_dim:
            raise ValueError(f"rope_dim must be even and at most head_dim ({self.head_dim}), not {self.rope_dim}")
        return self


PRESETS: dict[str, DimsSpec] = {
    dims.name: dims
    for dims in (
        DimsSpec(name="deepseek_v32", hidden=7168, q_lora_rank=1536, num_heads=64, num_layers=61, yarn=YarnSpec()),
        DimsSpec(
            name="glm_5", hidden=6144, q_lora_rank=2048, num_heads=32, num_layers=78, rope_style="interleaved", rope_theta=8e6
        ),
        # 64 heads as in V3.2: they set the ratio of the rotation of q to the gather of k. The rest is cut to suit two cores.
        DimsSpec(
            name="mini", hidden=256, q_lora_rank=128, num_heads=64, topk=64, num_layers=2, yarn=YarnSpec(original_positions=256)
        ),
    )
}


def dims_by_name(name: str) -> DimsSpec:
    """The preset of that name.

    Raises:
        ValueError: No preset has it.
    """
    if name not in PRESETS:
        raise ValueError(unknown_name("dims preset", name, PRESETS))
    return PRESETS[name]
