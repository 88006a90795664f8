"""Where an indexer's weights come from."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class WeightsSpec(BaseModel):
    """Seeded weights, or a checkpoint folder in DeepSeek-V3.2's safetensors layout: one layer of it, or as many from there on as a chain has."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    checkpoint: str | None = None
    layer: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _layer_is_of_a_checkpoint(self) -> Self:
        if self.layer and not self.checkpoint:
            raise ValueError("layer is one of a checkpoint: give checkpoint=DIR too; seeded weights have no layers")
        return self
