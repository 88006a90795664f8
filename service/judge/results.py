"""What a sweep says: results of cells and arms, computed from the records alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from experiments.names import BASELINE_ARM, METHODOLOGY_VERSION, Schedule, SweepStatus, Verdict
from experiments.spec.arms import ArmSpec
from experiments.spec.experiment import ExperimentSpec
from service.judge.accounting import Account, AccountSummary, ArmTimes, account, summarise
from service.judge.comparison import Comparison, compare
from service.judge.samples import Sample, Trial, by_launch, percentile, reduce_trials
from service.judge.verdict import Judgement, judge
from workers.messages import Fault

SERIAL_CONTROL = "_serial"
"""The arm that the controls add when no arm of the spec is `serial`: G needs one."""


@dataclass(frozen=True)
class Latency:
    """Of one pass through the workload, slowest rank of each step, us."""

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
    reason: str
    comparison: Comparison | None
    latency: Latency | None
    tokens_per_s: float | None
    gather_p50_us: float | None
    account: AccountSummary | None
    num_samples: int


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


def judge_cell(record: CellRecord, spec: ExperimentSpec) -> CellResult:
    """The result of one cell: right first, then a number, then a reason for it."""
    is_valid = not record.faults
    samples = reduce_trials(record.trials) if is_valid else []
    arms = tuple(_judge_arm(name, arm, spec, samples, record) for name, arm in spec.arms.items())
    late = [us for t in record.trials for us in t.late_us if us is not None and t.kind == "arms"]
    skew = [t.skew_us for t in record.trials if t.skew_us is not None and t.kind == "arms"]
    return CellResult(
        cell=record.cell,
        arms=arms,
        faults=record.faults,
        failure=record.failure,
        checks=record.checks,
        launches=len({t.launch for t in record.trials}),
        path=record.path,
        gather_floor_us=record.gather_floor_us,
        gather_late_p50_us=median(late) if is_valid and late and record.gather_floor_us is not None else None,
        skew_p50_us=median(skew) if is_valid and skew else None,
    )


def _judge_arm(name: str, arm: ArmSpec, spec: ExperimentSpec, samples: Sequence[Sample], record: CellRecord) -> ArmResult:
    plan = spec.measurement
    own = [s for s in samples if s.kind == "arms" and s.variant == name]
    comparison = None if name == BASELINE_ARM else compare(samples, name, BASELINE_ARM, plan.confidence, len(spec.arms) - 1)
    judgement = (
        Judgement(Verdict.INVALID, reason=record.faults[0].detail) if record.faults else judge(comparison, plan.indifference_pct)
    )
    times = [s.max_us for s in own]
    gathers = [s.gather_us for s in own if s.gather_us is not None]
    latency = None
    if times:
        latency = Latency(percentile(times, 0.5), percentile(times, 0.9), max(times), percentile([s.min_us for s in own], 0.5))
    tokens = record.cell["new_tokens"] / spec.dims.num_layers
    return ArmResult(
        arm=name,
        factors={key: str(value) for key, value in arm.model_dump(mode="json").items()},
        differs=arm.differs_from(spec.arms[BASELINE_ARM]),
        verdict=judgement.verdict if name != BASELINE_ARM or record.faults else None,
        is_small=judgement.is_small,
        reason=judgement.reason if name != BASELINE_ARM or record.faults else "",
        comparison=comparison,
        latency=latency,
        tokens_per_s=tokens * 1e6 / latency.p50_us if latency else None,
        gather_p50_us=median(gathers) if gathers else None,
        account=_account_arm(name, spec.arms, samples, plan.confidence),
        num_samples=len(own),
    )


def serial_arm(arms: Mapping[str, ArmSpec]) -> str:
    """The arm whose exposed time is G: the first `serial` one, or the one that the controls add."""
    return next((name for name, arm in arms.items() if arm.schedule == Schedule.SERIAL), SERIAL_CONTROL)


def _account_arm(name: str, arms: Mapping[str, ArmSpec], samples: Sequence[Sample], confidence: float) -> AccountSummary | None:
    accounts: list[Account] = []
    serial = serial_arm(arms)
    for launch in by_launch(samples).values():
        arm_times, serial_times = _arm_times(name, launch), _arm_times(serial, launch)
        if arm_times is not None and serial_times is not None:
            accounts.append(account(arm_times, serial_times))
    return summarise(accounts, confidence) if accounts else None


def _arm_times(name: str, launch: Sequence[Sample]) -> ArmTimes | None:
    """Medians of one launch's passes."""

    def passes(variant: str) -> list[Sample]:
        return [s for s in launch if s.variant == variant]

    total, compute, zero_byte = passes(name), passes(f"{name}/prefilled"), passes(f"{name}/zero_byte")
    if not total or not compute:
        return None
    compute_us = median(s.max_us for s in compute)
    return ArmTimes(
        total_us=median(s.max_us for s in total),
        compute_us=compute_us,
        zero_byte_us=median(s.max_us for s in zero_byte) if zero_byte else compute_us,
        window_us=median(s.window_us for s in compute),
    )
