"""Where an indexer's weights come from."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class WeightsSpec(BaseModel):
    """Seeded weights, or a checkpoint folder in DeepSeek-V3.2's safetensors layout: one layer of it, or as many from there on as a chain has."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    checkpoint: str | None = None
    layer: int = Field(0, ge=0)
