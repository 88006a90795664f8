"""The chain of the streaming regime: how many layers follow each other without a barrier."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class ChainSpec(BaseModel):
    """Read by cells of regime `streaming` alone."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layers: int = Field(4, ge=2, le=128)
    """Layers of one trial, each with weights of its own and inputs that depend on the layer before."""
