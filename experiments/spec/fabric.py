"""Fabrics as a spec states them: the real links, or a link model that a gather is held to.

Sources of the GPU presets: NVIDIA H200 datasheet (NVLink 4: 900 GB/s both ways, so 450 into a GPU); SGLang #17756 (a gather of 16K keys takes 27.6 us
on NCCL, of which the wire at that rate explains 8: the rest, and what nccl-tests print for small all-gathers on such machines, is 12 us and more of
latency); a 400 Gbit/s NIC moves 50 GB/s, and eight of them, one for each GPU of a node, 400 GB/s over NCCL's eight rings. A ring of two nodes passes
all but one rank's keys over every link, so every received byte counts at the slowest link's rate. NCCL 2.2x runs 16 channels of one CTA each there.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from experiments.errors import unknown_name
from experiments.names import FabricKind, Mover

PCIE_GBPS = 50.0
"""The most that a copy engine is asked to hold from pinned host memory: PCIe 5 x16 gives 55 GB/s in practice."""


class FabricSpec(BaseModel):
    """`process_group`: the links as they are. `emulated`: the same gather, held to `bandwidth_mbps` and `latency_us`. `one_rank`: the same model,
    played to one real rank on a GPU by a `mover`.

    An emulated gather ends no earlier than the last rank's arrival + latency + received bytes / bandwidth. It can only slow a
    link down: pick a link model slower than the real one, or the result says that the pace was the real link's.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: FabricKind
    bandwidth_mbps: float | None = Field(None, gt=0, le=1e7, allow_inf_nan=False)
    """Megabit a second into each rank."""
    latency_us: float | None = Field(None, ge=0, le=1e7, allow_inf_nan=False)
    mover: Mover | None = None
    """Of `one_rank` alone: who plays the peers."""
    ctas: int | None = Field(None, ge=1, le=128)
    """Of a cta_writer: the collective's CTAs."""
    plays: Literal["first", "last"] | None = None
    """Of `one_rank` alone: the rank that is real, 0 or cp_size - 1."""
    link: str | None = Field(None, pattern=r"^[a-z0-9][a-z0-9_]{0,31}$")
    """Of `one_rank` alone: what the link model is called in names."""
    nccl_ctas: int | None = Field(None, ge=1, le=64)
    """Of `process_group` alone, on device cuda: the CTAs of NCCL's collectives, no fewer and no more; None leaves them to NCCL."""

    @model_validator(mode="after")
    def _link_model_is_whole(self) -> FabricSpec:
        if self.kind is not FabricKind.PROCESS_GROUP and self.bandwidth_mbps is None:
            raise ValueError(f"fabric {self.kind.value} needs bandwidth_mbps (megabit a second), and may have latency_us")
        if self.kind is FabricKind.PROCESS_GROUP and (self.bandwidth_mbps is not None or self.latency_us is not None):
            raise ValueError("a process_group fabric takes its pace from the real links: drop bandwidth_mbps and latency_us")
        if self.kind is not FabricKind.PROCESS_GROUP and self.nccl_ctas is not None:
            raise ValueError("only a process_group fabric has nccl_ctas: drop it, or use kind process_group")
        return self

    @model_validator(mode="after")
    def _peers_are_played(self) -> FabricSpec:
        ours = {"mover": self.mover, "ctas": self.ctas, "plays": self.plays, "link": self.link}
        if self.kind is not FabricKind.ONE_RANK:
            given = [name for name, value in ours.items() if value is not None]
            if given:
                raise ValueError(f"only a one_rank fabric has {', '.join(given)}: drop it, or use kind one_rank")
            return self
        missing = [name for name in ("mover", "plays", "link") if ours[name] is None]
        if missing:
            raise ValueError(f"a one_rank fabric needs {', '.join(missing)}")
        if (self.mover is Mover.CTA_WRITER) != (self.ctas is not None):
            raise ValueError("a cta_writer needs ctas, the collective's number of CTAs, and a host_dma has none")
        assert self.bandwidth_mbps is not None
        if self.mover is Mover.HOST_DMA and self.bandwidth_mbps > PCIE_GBPS * 8e3:
            raise ValueError(
                f"host_dma cannot hold {self.bandwidth_mbps / 8e3:g} GB/s: a copy engine brings {PCIE_GBPS:g} GB/s from host memory; "
                "use the mover cta_writer, or a slower link"
            )
        return self

    @property
    def name(self) -> str:
        """Short and honest: what is emulated says so."""
        if self.kind is FabricKind.PROCESS_GROUP:
            return f"{self.kind.value}_{self.nccl_ctas}ctas" if self.nccl_ctas else self.kind.value
        if self.kind is FabricKind.ONE_RANK:
            return f"{self.kind.value}_{self.link}_{self.plays}"
        latency = f"_{self.latency_us:g}us" if self.latency_us else ""
        return f"{self.kind.value}_{self.bandwidth_mbps:g}mbit{latency}"

    @property
    def identity(self) -> dict[str, Any]:
        """What a cell's identity takes of it: what came later, and is not used, is left out, and so is a mere name."""
        later = {"mover", "ctas", "plays", "nccl_ctas"}
        return {
            key: value
            for key, value in self.model_dump(mode="json", exclude={"link"}).items()
            if key not in later or value is not None
        }

    def played_rank(self, cp_size: int) -> int:
        """Which of the ranks a one_rank fabric's is."""
        return 0 if self.plays == "first" else cp_size - 1

    def num_processes(self, cp_size: int) -> int:
        """Rank processes that a cell needs."""
        return 1 if self.kind is FabricKind.ONE_RANK else cp_size

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


def _one_rank(link: str, gbps: float, latency_us: float, mover: Mover, ctas: int | None) -> dict[str, FabricSpec]:
    return {
        f"{link}_{plays}": FabricSpec(
            kind=FabricKind.ONE_RANK,
            bandwidth_mbps=gbps * 8e3,
            latency_us=latency_us,
            mover=mover,
            ctas=ctas,
            plays=plays,
            link=link,
        )
        for plays in ("first", "last")
    }


LINKS: dict[str, dict[str, FabricSpec]] = {
    "nvlink4_hgx_h200": _one_rank("nvlink4_hgx_h200", 450, 12, Mover.CTA_WRITER, 16),
    "hgx_8x400g_2node": _one_rank("hgx_8x400g_2node", 400, 30, Mover.CTA_WRITER, 16),
    "one_400g_nic_per_node": _one_rank("one_400g_nic_per_node", 50, 30, Mover.HOST_DMA, None),
}
"""Link models of GPU clusters; each stands for two cells, in which the first and the last rank are real in turn."""


def fabrics_by_name(name: str) -> tuple[FabricSpec, ...]:
    """The presets of that name: one, or a link's first and last rank.

    Raises:
        ValueError: No preset has it; a link model of one's own is a mapping with kind, bandwidth_mbps and latency_us.
    """
    if name in LINKS:
        return tuple(LINKS[name].values())
    for ends in LINKS.values():
        if name in ends:
            return (ends[name],)
    if name not in PRESETS:
        raise ValueError(unknown_name("fabric", name, [*PRESETS, *LINKS]))
    return (PRESETS[name],)
