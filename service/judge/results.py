"""What a sweep says: results of cells and arms, computed from the records alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.names import METHODOLOGY_VERSION, SweepStatus, Verdict
from service.judge.accounting import AccountSummary
from service.judge.comparison import Comparison
from service.judge.samples import Trial
from workers.device_state import DeviceState
from workers.messages import Fault

SERIAL_CONTROL = "_serial"
"""The arm that the controls add when no arm of the spec is `serial`: G needs one."""


@dataclass(frozen=True)
class Latency:
    """Of one pass through the workload, us a layer; drained: the slowest rank of each step, streaming: the median rank."""

    p50_us: float
    p90_us: float
    max_us: float
    fastest_rank_p50_us: float


@dataclass(frozen=True)
class ArmResult:
    """One arm of one cell. Times are None in an INVALID cell: it shows no speed."""

    arm: str
    factors: dict[str, str]
    differs: dict[str, tuple[str, str]]
    verdict: Verdict | None
    """None for the baseline, which is compared with nothing."""
    is_small: bool
    """See `Judgement`; so is `may_be_small`."""
    may_be_small: bool
    reason: str
    comparison: Comparison | None
    latency: Latency | None
    tokens_per_s: float | None
    gather_p50_us: float | None
    account: AccountSummary | None
    num_samples: int
    host_bound: bool | None
    """Whether a host without a head start would be what sets the pace; None where the host does the work itself (CPU, simulated)."""


@dataclass(frozen=True)
class GpuConduct:
    """How the GPUs of a cell behaved, over all ranks and blocks.

    Attributes:
        sm_mhz: The lowest and the highest clock; None where NVML's binding is missing.
        slowdowns: What held clocks down, and after how many blocks it was seen.
        blocks: How many blocks there were.
        peak_memory_mib: The most that a rank held.
    """

    sm_mhz: tuple[int, int] | None
    slowdowns: dict[str, int]
    blocks: int
    peak_memory_mib: float


@dataclass(frozen=True)
class CellResult:
    """One cell. `faults` say why it is INVALID."""

    cell: dict[str, Any]
    arms: tuple[ArmResult, ...]
    faults: tuple[Fault, ...]
    failure: str
    checks: dict[str, Any]
    launches: int
    path: str
    gather_floor_us: float | None
    gather_late_p50_us: float | None
    skew_p50_us: float | None
    lateness_us: tuple[float, ...]
    """By rank: how much later than the first one it arrived at the gather, on the mean over the arms' trials; empty without a shared clock."""
    filler_p50_us: float | None
    """What the filler after each layer really took; None where the cell has none."""
    aa: Comparison | None
    """The second copy of the baseline against the first, read by itself."""
    gpus: GpuConduct | None
    """Of the GPUs after its blocks; None without any."""
    shares_gpus: bool
    """Several ranks ran on one GPU: its arms have no times and no verdict, since kernels of different ranks took turns."""

    @property
    def label(self) -> str:
        return str(self.cell["label"])

    @property
    def is_invalid(self) -> bool:
        return bool(self.faults)

    @property
    def is_measured(self) -> bool:
        return not self.faults and all(arm.num_samples for arm in self.arms)


@dataclass(frozen=True)
class AACheck:
    """The sweep's A/A pairs, tested together: equal code must look equal.

    Attributes:
        flagged: Labels of the cells where it did not, after Holm's correction over all cells; empty in 19 of 20 sound sweeps.
        cells: How many cells had a pair.
        smallest_p: Of any cell, before the correction; None without pairs.
        suspects: The likely causes where a cell is flagged.
    """

    flagged: tuple[str, ...]
    cells: int
    smallest_p: float | None
    suspects: tuple[str, ...] = ()


@dataclass(frozen=True)
class SweepResult:
    """A whole sweep."""

    sweep_id: str
    experiment: str
    status: SweepStatus
    spec_hash: str
    environment: dict[str, Any]
    cells: tuple[CellResult, ...]
    replay: dict[str, Any] | None
    started_at: str
    ended_at: str | None
    failure: str
    aa: AACheck
    confidence: float
    """Of every ratio's interval."""
    methodology_version: int = METHODOLOGY_VERSION


@dataclass(frozen=True)
class CellRecord:
    """What the records hold of one cell."""

    cell: dict[str, Any]
    trials: Sequence[Trial]
    faults: tuple[Fault, ...]
    failure: str
    checks: dict[str, Any]
    path: str
    gather_floor_us: float | None
    device_states: Sequence[tuple[DeviceState, ...]] = ()
    """Of every block, every rank's GPU."""
    shares_gpus: bool = False


def shared_gpus(ranks: Sequence[Mapping[str, Any]]) -> list[str]:
    """Every rank's GPU, by UUID, where some rank has not one of its own; else nothing. `ranks`: as a launch's row holds them."""
    uuids = [str(rank["gpu_uuid"]) for rank in ranks if rank.get("gpu_uuid")]
    return uuids if len(set(uuids)) < len(uuids) else []
