"""Fabrics as a spec states them: the real links, or a link model that the real gather is held to."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, model_validator

from experiments.errors import unknown_name
from experiments.names import FabricKind


class FabricSpec(BaseModel):
    """`process_group`: the links as they are. `emulated`: the same gather, held to `bandwidth_mbps` and `latency_us`.

    An emulated gather ends no earlier than the last rank's arrival + latency + received bytes / bandwidth. It can only slow a
    link down: pick a link model slower than the real one, or the result says that the pace was the real link's.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: FabricKind
    bandwidth_mbps: float | None = Field(None, gt=0, le=1e7, allow_inf_nan=False)
    """Megabit a second into each rank."""
    latency_us: float | None = Field(None, ge=0, le=1e7, allow_inf_nan=False)

    @model_validator(mode="after")
    def _link_model_is_whole(self) -> FabricSpec:
        if self.kind is FabricKind.EMULATED and self.bandwidth_mbps is None:
            raise ValueError("an emulated fabric needs bandwidth_mbps (megabit a second), and may have latency_us")
        if self.kind is FabricKind.PROCESS_GROUP and (self.bandwidth_mbps is not None or self.latency_us is not None):
            raise ValueError("a process_group fabric takes its pace from the real links: drop bandwidth_mbps and latency_us")
        return self

    @property
    def name(self) -> str:
        """Short and honest: what is emulated says so."""
        if self.kind is FabricKind.PROCESS_GROUP:
            return self.kind.value
        latency = f"_{self.latency_us:g}us" if self.latency_us else ""
        return f"{self.kind.value}_{self.bandwidth_mbps:g}mbit{latency}"

    def floor_us(self, received_bytes: int) -> float | None:
        """The least time the link model allows a gather after the last rank's arrival; None on real links."""
        if self.bandwidth_mbps is None:
            return None
        return (self.latency_us or 0.0) + received_bytes * 8 / self.bandwidth_mbps


PRESETS: dict[str, FabricSpec] = {
    "process_group": FabricSpec(kind=FabricKind.PROCESS_GROUP),
    "emulated_20mbit": FabricSpec(kind=FabricKind.EMULATED, bandwidth_mbps=20),
    "emulated_100mbit": FabricSpec(kind=FabricKind.EMULATED, bandwidth_mbps=100),
    "emulated_1gbit": FabricSpec(kind=FabricKind.EMULATED, bandwidth_mbps=1000),
}


def fabric_by_name(name: str) -> FabricSpec:
    """The preset of that name.

    Raises:
        ValueError: No preset has it; a link model of one's own is a mapping with kind, bandwidth_mbps and latency_us.
    """
    if name not in PRESETS:
        raise ValueError(unknown_name("fabric", name, PRESETS))
    return PRESETS[name]
