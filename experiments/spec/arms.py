"""An arm: one way of running the indexer, as a frozen set of factors over defaults."""

from __future__ import annotations

import re

from pydantic import BaseModel, ConfigDict, Field, field_validator

from experiments.errors import unknown_name
from experiments.names import Execution, Logits, Payload, Schedule, Stages, Transport

_USER_SCHEDULE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


class ArmSpec(BaseModel):
    """The factors of one arm. Two arms are compared by the factors that differ."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schedule: str = Schedule.SERIAL.value
    """A shipped schedule's name, or `module:function`, the user's own."""
    payload: Payload = Payload.BF16
    transport: Transport = Transport.COLLECTIVE
    """`symmetric_memory`: CUDA only, all ranks on one host, over a process_group fabric."""
    stages: Stages = Stages.SEPARATE
    logits: Logits = Logits.CPLAB
    """`deepgemm`: CUDA only, 32 or 64 heads of 128."""
    execution: Execution = Execution.EAGER
    reserved_sms: int = Field(0, ge=0, le=128)
    """SMs that GEMMs and logits leave to others, so that a collective of that many CTAs never waits for one of their waves; CUDA only."""
    planted_wait_us: float = Field(0.0, ge=0, le=1e7, allow_inf_nan=False)
    """An extra wait that the main lane spins through in every layer that this arm and its controls time: a slow-down of known size, for
    power studies and tests. It changes no output. It is a factor like the others, so a result that has one says so: in `factors`, in
    `differs`, and in the notes below the table."""

    @field_validator("schedule")
    @classmethod
    def _schedule_is_known(cls, value: str) -> str:
        if value in set(Schedule) or _USER_SCHEDULE.fullmatch(value):
            return value
        raise ValueError(unknown_name("schedule", value, [*Schedule, "module:function"]))

    @property
    def is_user_schedule(self) -> bool:
        return ":" in self.schedule

    def differs_from(self, other: ArmSpec) -> dict[str, tuple[str, str]]:
        """The factors that a comparison with `other` is about: name -> (other's value, this one's)."""
        ours, theirs = self.model_dump(mode="json"), other.model_dump(mode="json")
        return {factor: (str(theirs[factor]), str(ours[factor])) for factor in ours if ours[factor] != theirs[factor]}
