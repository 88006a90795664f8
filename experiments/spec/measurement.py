"""The plan of measurement: how often, against what noise, and for how long to wait."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class MeasurementSpec(BaseModel):
    """How a cell is measured. Blocks are dispatched in one call each; a launch is one life of the rank processes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    launches: int = Field(5, ge=5, le=1000)
    """Lives of the rank group before the first look at the data. Effects differ between launches, and fewer than 5 show too little of
    how much they do."""
    max_launches: int | None = Field(None, ge=5, le=1000)
    """Launches of a cell that is not decided sooner; None: as many as `launches`, and one look. The looks are planned from both, and the
    error is shared out among them in advance."""
    precision_pct: float | None = Field(None, gt=0, lt=50)
    """Go on until the interval reaches at most this far to either side; None: until the verdict is FASTER, SLOWER or SAME."""
    time_budget_s: float | None = Field(None, gt=0, le=1e7)
    """No launch beyond the first `launches` begins later than this after the sweep's start."""
    blocks: int = Field(2, ge=1, le=10000)
    """Blocks of the arms in each launch and cell."""
    trials_per_block: int = Field(8, ge=1, le=10000)
    """Trials of each arm in a block, rounded up to whole Williams designs."""
    control_trials: int = Field(4, ge=2, le=10000)
    """Trials of each control in a control block, rounded up to whole Williams designs; one follows every block of the arms."""
    warmup_trials: int = Field(3, ge=1, le=1000)
    """Untimed trials of each variant before a launch's first block, and of each arm in every further block of warming up."""
    max_warmup_blocks: int = Field(4, ge=1, le=1000)
    """Blocks of warming up after which a launch is timed though its trials still get faster or slower; the result says how often."""
    aa: bool = True
    """Time a second copy of the baseline in every block: the noise floor, measured where the claim is made."""
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
    attempts: int = Field(3, ge=1, le=100)
    """How often a cell is tried in a launch, each time on new ranks, before it is given up; so is a group that does not come up."""

    @model_validator(mode="after")
    def _launches_are_ordered(self) -> Self:
        if self.max_launches is not None and self.max_launches < self.launches:
            raise ValueError(f"max_launches is {self.max_launches}, fewer than launches ({self.launches}): raise it, or drop it")
        return self

    @property
    def last_launches(self) -> int:
        """The most launches that a cell gets."""
        return self.max_launches or self.launches


class VerifySpec(BaseModel):
    """How hard a cell is checked before its speed is believed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rows_per_rank: int = Field(16, ge=1, le=4096)
    """Rows that each rank checks against R2, the first and last of each of its blocks among them."""
    delay_ms: float = Field(20, ge=0, le=1000)
    """What a lane is held back by, behind every fork, in two verification runs per arm: the side lane in one, so that a missing wait reads the
    poison, the main lane in the other, so that a gather of what it has yet to write sends something else."""
    logits_mib: int = Field(256, ge=1, le=1 << 20)
    """Bound on the memory of a chunk of logits, mebibytes."""
