"""The plan of measurement: how often, against what noise, and for how long to wait."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class MeasurementSpec(BaseModel):
    """How a cell is measured. Blocks are dispatched in one call each; a launch is one life of the rank processes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    launches: int = Field(5, ge=3, le=1000)
    """Lives of the rank group. Effects differ between launches, so fewer than 3 give no interval."""
    blocks: int = Field(2, ge=1, le=10000)
    """Blocks of the arms in each launch and cell."""
    trials_per_block: int = Field(8, ge=1, le=10000)
    """Trials of each arm in a block, rounded up to whole Williams designs."""
    control_trials: int = Field(4, ge=2, le=10000)
    """Trials of each control in the one control block of each launch and cell."""
    warmup_trials: int = Field(3, ge=1, le=1000)
    """Untimed trials of each variant before the first block of a launch."""
    inputs: int = Field(3, ge=2, le=64)
    """Input sets in rotation: a trial never sees the inputs of the one before it."""
    confidence: float = Field(0.95, gt=0.5, lt=1)
    indifference_pct: float = Field(1.0, ge=0, lt=50)
    """Effects inside this band (per cent of the baseline's time) are too small to act on."""
    gather_timeout_s: float = Field(30, gt=0, le=3600)
    """A gather, a barrier or a rendezvous that takes longer has failed."""
    block_timeout_s: float = Field(300, gt=0, le=86400)
    """A block (or a verification) that takes longer has failed, and the group with it."""
    launch_timeout_s: float = Field(120, gt=0, le=3600)
    """Actors and rank processes that take longer to come up have failed."""


class VerifySpec(BaseModel):
    """How hard a cell is checked before its speed is believed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rows_per_rank: int = Field(16, ge=1, le=4096)
    """Rows that each rank checks against R2, the first and last of each of its blocks among them."""
    delay_ms: float = Field(20, ge=0, le=1000)
    """Injected before the gather in one verification run per arm: a missing wait then reads the poison."""
    logits_mib: int = Field(256, ge=1, le=1 << 20)
    """Bound on the memory of a chunk of logits, mebibytes."""


class PlacementSpec(BaseModel):
    """Where ranks go."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    strategy: str = Field("PACK", pattern="^(PACK|SPREAD|STRICT_PACK|STRICT_SPREAD)$")
    cpus_per_rank: float = Field(1.0, gt=0, le=1024)
    """Ray CPUs that a rank reserves. Below 1 ranks share cores: right for tests of behaviour, wrong for speed."""
