"""Judging: from the records of a sweep's cells to its results. All cells are read together, since their levels depend on each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from experiments.names import AA_ARM, BASELINE_ARM, Regime, Schedule, Verdict
from experiments.spec.arms import ArmSpec
from experiments.spec.experiment import ExperimentSpec
from service.judge.accounting import Account, AccountSummary, ArmTimes, account, summarise
from service.judge.comparison import SAME_ERROR, Evidence, evidence_of
from service.judge.family import discovery_level, flagged
from service.judge.looks import Looks
from service.judge.results import SERIAL_CONTROL, AACheck, ArmResult, CellRecord, CellResult, GpuConduct, Latency
from service.judge.samples import Sample, by_launch, launch_time_us, percentile, reduce_trials
from service.judge.verdict import Judgement, judge
from workers.device_state import DeviceState

HOST_BOUND_SHARE = 0.95
"""An arm is host bound when enqueuing its work takes the host that share of the work's own time, on the median. A trial gives the host a head start,
so its time is the device's; a server whose host is not ahead would wait for it, and what a schedule changes on the device would not show there."""


@dataclass(frozen=True)
class _Reading:
    """A cell's samples and the evidence on its arms, before anything is read at a level.

    Attributes:
        samples: All of them, to be counted.
        timed: Those whose times are somebody's: none where ranks shared a GPU.
    """

    record: CellRecord
    samples: list[Sample]
    timed: list[Sample]
    evidence: dict[str, Evidence | None]


@dataclass(frozen=True)
class _Levels:
    """The errors at which differences (two-sided) and equalities (each of two sides) are read."""

    difference: float
    same: float


@dataclass(frozen=True)
class Judged:
    """All cells of a sweep, read together.

    Attributes:
        confidence: What every ratio's interval holds with, corrected for the number of comparisons and discoveries.
    """

    cells: tuple[CellResult, ...]
    aa: AACheck
    confidence: float


def judge_sweep(records: Sequence[CellRecord], spec: ExperimentSpec, at_planned_looks: bool = False) -> Judged:
    """Right first, then a number, then a reason for it. `at_planned_looks`: comparisons rest on the launches up to each cell's last planned look."""
    readings = [_read(record, spec, at_planned_looks) for record in records]
    levels = _levels(readings, spec)
    cells = tuple(_judge_cell(reading, spec, levels) for reading in readings)
    return Judged(cells, _check_aa(readings, spec), 1 - levels.difference)


def evidence_in(record: CellRecord, spec: ExperimentSpec) -> dict[str, Evidence | None]:
    """The evidence on every arm of a cell but the baseline, by name; nothing for an INVALID one."""
    return _read(record, spec).evidence


def is_decided(record: CellRecord, spec: ExperimentSpec, num_comparisons: int) -> bool:
    """Whether a cell needs no further launch: every arm's verdict stands, or its interval is as narrow as asked.

    Read as if no other comparison of the sweep's `num_comparisons` were a discovery: whatever the others turn out to be, the level can
    only become less strict. FASTER and SLOWER so stand; a SAME may yet become a small difference.
    """
    reading, plan = _read(record, spec), spec.measurement
    levels = _Levels((1 - plan.confidence) / num_comparisons, SAME_ERROR / num_comparisons)
    evidence = [reading.evidence[name] for name in spec.arms if name != BASELINE_ARM]
    read = [e.read(levels.difference, levels.same) for e in evidence if e is not None]
    if record.faults or record.shares_gpus:
        return True
    if len(read) < len(evidence):
        return False
    if plan.precision_pct is None:
        return all(judge(c, plan.indifference_pct).verdict is not Verdict.UNRESOLVED for c in read)
    return all(max(c.ratio.high / c.ratio.estimate, c.ratio.estimate / c.ratio.low) <= 1 + plan.precision_pct / 100 for c in read)


def _read(record: CellRecord, spec: ExperimentSpec, at_planned_looks: bool = False) -> _Reading:
    plan = spec.measurement
    looks = Looks(plan.launches, plan.last_launches)
    samples = reduce_trials(record.trials, regime_of(record)) if not record.faults else []
    timed = samples if not record.shares_gpus else []
    compared = timed
    if at_planned_looks:
        launches = list(by_launch(timed))
        read = set(launches[: looks.last_planned(len(launches))])
        compared = [s for s in timed if s.launch in read]
    others = [*(name for name in spec.arms if name != BASELINE_ARM), AA_ARM]
    return _Reading(record, samples, timed, {name: evidence_of(compared, name, BASELINE_ARM, looks) for name in others})


def regime_of(record: CellRecord) -> Regime:
    return Regime(record.cell["regime"])


def _levels(readings: Sequence[_Reading], spec: ExperimentSpec) -> _Levels:
    found = [e for reading in readings for name, e in reading.evidence.items() if e is not None and name != AA_ARM]
    rate = 1 - spec.measurement.confidence
    if not found:
        return _Levels(rate, SAME_ERROR)
    return _Levels(
        discovery_level([e.p_claim for e in found], rate),
        discovery_level([e.p_same(spec.measurement.indifference_pct) for e in found], SAME_ERROR),
    )


def _check_aa(readings: Sequence[_Reading], spec: ExperimentSpec) -> AACheck:
    pairs = {str(r.record.cell["label"]): e.p_value for r in readings if (e := r.evidence[AA_ARM]) is not None}
    flags = flagged(list(pairs.values()), 1 - spec.measurement.confidence)
    return AACheck(
        flagged=tuple(label for label, is_flagged in zip(pairs, flags, strict=True) if is_flagged),
        cells=len(pairs),
        smallest_p=min(pairs.values(), default=None),
    )


def _judge_cell(reading: _Reading, spec: ExperimentSpec, levels: _Levels) -> CellResult:
    record, aa = reading.record, reading.evidence[AA_ARM]
    is_valid = not record.faults and not record.shares_gpus
    arms = tuple(_judge_arm(name, spec, reading, levels) for name in spec.arms)
    late = [us for t in record.trials for us in t.late_us if us is not None and t.kind == "arms"]
    skew = [t.skew_us for t in record.trials if t.skew_us is not None and t.kind == "arms"]
    lateness = [
        [us for us in t.lateness_us if us is not None]
        for t in record.trials
        if t.skew_us is not None and t.lateness_us and t.kind == "arms"
    ]
    filler = [us for t in record.trials for us in t.filler_us if us is not None and t.kind == "arms"]
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
        lateness_us=tuple(fmean(rank) for rank in zip(*lateness, strict=True)) if is_valid else (),
        filler_p50_us=median(filler) if is_valid and filler else None,
        aa=aa.read(1 - spec.measurement.confidence, SAME_ERROR) if aa is not None else None,
        gpus=_gpus(record.device_states),
        shares_gpus=record.shares_gpus,
    )


def _gpus(blocks: Sequence[tuple[DeviceState, ...]]) -> GpuConduct | None:
    states = [state for block in blocks for state in block]
    if not states:
        return None
    clocks = [state.sm_mhz for state in states if state.sm_mhz is not None]
    seen = Counter(name for block in blocks for name in {name for state in block for name in state.slowdowns})
    return GpuConduct(
        sm_mhz=(min(clocks), max(clocks)) if clocks else None,
        slowdowns=dict(sorted(seen.items())),
        blocks=len(blocks),
        peak_memory_mib=max(state.peak_memory_mib for state in states),
    )


def _judge_arm(name: str, spec: ExperimentSpec, reading: _Reading, levels: _Levels) -> ArmResult:
    plan, arm, record = spec.measurement, spec.arms[name], reading.record
    own = [s for s in reading.timed if s.kind == "arms" and s.variant == name]
    evidence = reading.evidence.get(name)
    comparison = evidence.read(levels.difference, levels.same) if evidence is not None else None
    if record.faults:
        judgement = Judgement(Verdict.INVALID, reason=record.faults[0].detail)
    elif record.shares_gpus:
        judgement = Judgement(
            Verdict.UNRESOLVED, reason="ranks shared a GPU: right for behaviour, and their times are nobody's speed"
        )
    else:
        judgement = judge(comparison, plan.indifference_pct)
    times = [s.time_us for s in own]
    gathers = [s.gather_us for s in own if s.gather_us is not None]
    latency = None
    if times:
        latency = Latency(percentile(times, 0.5), percentile(times, 0.9), max(times), percentile([s.min_us for s in own], 0.5))
    shares = [s.enqueue_share for s in own if s.enqueue_share is not None]
    # A filler stands for what is no part of the indexer.
    is_indexer_alone = not record.cell.get("filler_us")
    tokens = record.cell["new_tokens"] / spec.dims.num_layers
    return ArmResult(
        arm=name,
        factors={key: str(value) for key, value in arm.model_dump(mode="json").items()},
        differs=arm.differs_from(spec.arms[BASELINE_ARM]),
        verdict=judgement.verdict if name != BASELINE_ARM or record.faults else None,
        is_small=judgement.is_small,
        may_be_small=judgement.may_be_small,
        reason=judgement.reason if name != BASELINE_ARM or record.faults else "",
        comparison=comparison,
        latency=latency,
        tokens_per_s=tokens * 1e6 / latency.p50_us if latency and is_indexer_alone else None,
        gather_p50_us=median(gathers) if gathers else None,
        account=_account_arm(name, spec.arms, reading.timed, regime_of(record), plan.confidence),
        num_samples=sum(s.kind == "arms" and s.variant == name for s in reading.samples),
        host_bound=median(shares) >= HOST_BOUND_SHARE if shares else None,
    )


def serial_arm(arms: Mapping[str, ArmSpec]) -> str:
    """The arm whose exposed time is G: the first `serial` one without a planted wait, or the one that the controls add."""
    return next(
        (name for name, arm in arms.items() if arm.schedule == Schedule.SERIAL and not arm.planted_wait_us), SERIAL_CONTROL
    )


def _account_arm(
    name: str, arms: Mapping[str, ArmSpec], samples: Sequence[Sample], regime: Regime, confidence: float
) -> AccountSummary | None:
    accounts: list[Account] = []
    serial = serial_arm(arms)
    for launch in by_launch(samples).values():
        arm_times, serial_times = _arm_times(name, launch, regime), _arm_times(serial, launch, regime)
        if arm_times is not None and serial_times is not None:
            accounts.append(account(arm_times, serial_times))
    return summarise(accounts, confidence) if accounts else None


def _arm_times(name: str, launch: Sequence[Sample], regime: Regime) -> ArmTimes | None:
    """One launch's times of an arm and its controls."""

    def passes(variant: str) -> list[Sample]:
        return [s for s in launch if s.variant == variant]

    total, compute, zero_byte = passes(name), passes(f"{name}/prefilled"), passes(f"{name}/zero_byte")
    if not total or not compute:
        return None
    compute_us = launch_time_us(compute, regime)
    return ArmTimes(
        total_us=launch_time_us(total, regime),
        compute_us=compute_us,
        zero_byte_us=launch_time_us(zero_byte, regime) if zero_byte else compute_us,
        window_us=median(s.window_us for s in compute),
    )
