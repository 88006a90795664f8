"""Change: what happened to an arm's ratio between two sweeps, such as two revisions of the code.

Each sweep's ratio is taken against a baseline that ran beside the arm in the same live group, so a faster machine or a warmer day cancels in
it; absolute times of two sweeps are never judged. The change of a ratio is a ratio of ratios: the difference of two means of per-launch log
ratios, with Welch's t (Biometrika 34, 1947), since launches scatter differently on different days. Both sweeps were read at planned looks; the
error that a reading may spend is the product of the two looks' shares, which sum to one over all pairs of looks (union bound).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from experiments.errors import UserError
from experiments.names import BASELINE_ARM, Verdict
from experiments.spec.experiment import ExperimentSpec
from service.judge.comparison import POWER, SAME_ERROR, Comparison, Evidence
from service.judge.family import discovery_level
from service.judge.interval import Interval, one_sided_p, standard_error, t_quantile, two_sided_p
from service.judge.judging import evidence_in
from service.judge.results import ArmResult, CellRecord, CellResult, SweepResult
from service.judge.verdict import Judgement, judge


@dataclass(frozen=True)
class JudgedSweep:
    """A sweep with what its judgement rests on."""

    result: SweepResult
    spec: ExperimentSpec
    records: Sequence[CellRecord]


@dataclass(frozen=True)
class ChangeEvidence:
    """One arm of one cell in both sweeps, before the change is read at a level."""

    before: Evidence
    after: Evidence

    @property
    def share(self) -> float:
        return self.before.share * self.after.share

    @cached_property
    def _slowest(self) -> tuple[float, float, int]:
        return _welch(self.before.logs, self.after.logs)

    @property
    def p_value(self) -> float:
        """Of an unchanged ratio."""
        return min(1.0, two_sided_p(*self._slowest) / self.share)

    @property
    def p_claim(self) -> float:
        """Of there being no change to claim: both the slowest and the fastest ranks have to bear it out (see `Evidence.p_claim`)."""
        mean, error, degrees = _welch(self.before.logs_min, self.after.logs_min)
        if mean * self._slowest[0] < 0:
            return 1.0
        return max(self.p_value, min(1.0, two_sided_p(mean, error, degrees) / self.share))

    def p_same(self, indifference_pct: float) -> float:
        """Of a change beyond the indifference band: two one-sided tests."""
        if indifference_pct == 0:
            return 1.0
        mean, error, degrees = self._slowest
        below = one_sided_p(math.log1p(indifference_pct / 100) - mean, error, degrees)
        above = one_sided_p(mean - math.log1p(-indifference_pct / 100), error, degrees)
        return min(1.0, max(below, above) / self.share)

    def read(self, level: float, level_same: float) -> Comparison:
        """The change at the error `level` (two-sided) and, for SAME, `level_same` (each of two sides); below 1 the arm has gained."""
        _, error, degrees = self._slowest
        detectable = (t_quantile(1 - level * self.share, degrees) + t_quantile(2 * POWER - 1, degrees)) * error
        return Comparison(
            ratio=_around(self._slowest, 1 - level * self.share),
            ratio_90=_around(self._slowest, 1 - 2 * level_same * self.share),
            ratio_min=_around(_welch(self.before.logs_min, self.after.logs_min), 1 - level * self.share),
            p_value=self.p_value,
            detectable_pct=100 * math.expm1(min(detectable, 700.0)),
            confidence=1 - level,
            launches=min(len(self.before.logs), len(self.after.logs)),
            pairs=self.before.pairs + self.after.pairs,
        )


def _welch(before: Sequence[float], after: Sequence[float]) -> tuple[float, float, int]:
    """Difference of the means, its standard error, and degrees of freedom: those of the smaller side.

    Satterthwaite's are right on the average and too many far out in the tail, where shares of looks and families of rows are read (with 8 and 5
    launches and one side four times as noisy, 0.1 % was really 0.28 %); those of the smaller side are never too many (Hsu, Stat. Res. Mem. 2, 1938;
    Mickey and Brown, Ann. Math. Stat. 37, 1966).
    """
    mean = math.fsum(after) / len(after) - math.fsum(before) / len(before)
    error = math.hypot(standard_error(before), standard_error(after))
    return mean, error, min(len(before), len(after)) - 1


def _around(welch: tuple[float, float, int], confidence: float) -> Interval:
    mean, error, degrees = welch
    half = t_quantile(confidence, degrees) * error
    return Interval(mean, mean - half, mean + half).map_exp()


@dataclass(frozen=True)
class Change:
    """One (cell, arm) that both sweeps have.

    Attributes:
        judgement: About the change: FASTER means that the arm's ratio to its baseline has fallen.
        change: Ratio of ratios; None when one side is INVALID or has too few launches.
        before, after: The arm as each sweep's own page has it; `baseline_before`, `baseline_after` its baseline.
    """

    cell_id: str
    label: str
    arm: str
    judgement: Judgement
    change: Comparison | None
    before: ArmResult
    after: ArmResult
    baseline_before: ArmResult
    baseline_after: ArmResult


@dataclass(frozen=True)
class Changes:
    """Two sweeps, cell by cell. `confidence` is of every change's interval, all read together."""

    before: SweepResult
    after: SweepResult
    rows: tuple[Change, ...]
    confidence: float
    only_before: tuple[str, ...]
    only_after: tuple[str, ...]
    notes: tuple[str, ...]

    def has(self, verdict: Verdict) -> bool:
        return any(row.judgement.verdict is verdict for row in self.rows)


def compare_sweeps(before: JudgedSweep, after: JudgedSweep) -> Changes:
    """The changes of every (cell, arm) in both. The band and the confidence are the later sweep's.

    Raises:
        UserError: The sweeps have no cell and arm in common, other baselines, or another methodology.
    """
    _refuse(before, after)
    pairs = _pairs(before, after)
    arms = {(cell_id, name) for cell_id, _, _ in pairs for name in after.spec.arms if name in before.spec.arms} - {
        (cell_id, BASELINE_ARM) for cell_id, _, _ in pairs
    }
    if not arms:
        raise UserError(
            f"SWEEP: {before.result.sweep_id} and {after.result.sweep_id} have no cell and arm in common "
            f"(cells {_labels(before.result)}; {_labels(after.result)})"
        )
    evidence = {key: _evidence(key, before, after) for key in sorted(arms)}
    found = [e for e in evidence.values() if e is not None]
    plan = after.spec.measurement
    level, level_same = 1 - plan.confidence, SAME_ERROR
    if found:
        level = discovery_level([e.p_claim for e in found], level)
        level_same = discovery_level([e.p_same(plan.indifference_pct) for e in found], SAME_ERROR)
    rows = []
    for cell_id, old, new in pairs:
        for name in after.spec.arms:
            if (cell_id, name) in arms:
                e = evidence[(cell_id, name)]
                rows.append(_row(name, old, new, e.read(level, level_same) if e is not None else None, plan.indifference_pct))
    return Changes(
        before=before.result,
        after=after.result,
        rows=tuple(rows),
        confidence=1 - level,
        only_before=_only(before, after),
        only_after=_only(after, before),
        notes=tuple(_notes(before, after, pairs)),
    )


def _refuse(before: JudgedSweep, after: JudgedSweep) -> None:
    old, new = before.result, after.result
    if old.sweep_id == new.sweep_id:
        raise UserError(f"SWEEP: {old.sweep_id} is compared with itself: name two sweeps")
    if old.methodology_version != new.methodology_version:
        raise UserError(
            f"SWEEP: {old.sweep_id} was measured under methodology {old.methodology_version}, {new.sweep_id} under "
            f"{new.methodology_version}: their figures mean different things"
        )
    theirs, ours = before.spec.arms[BASELINE_ARM], after.spec.arms[BASELINE_ARM]
    if differs := ours.differs_from(theirs):
        words = ", ".join(f"{factor} {was} and {now}" for factor, (was, now) in differs.items())
        raise UserError(f"SWEEP: the baselines differ ({words}): ratios to different baselines cannot be compared")


def _pairs(before: JudgedSweep, after: JudgedSweep) -> list[tuple[str, CellResult, CellResult]]:
    old = {str(cell.cell["cell_id"]): cell for cell in before.result.cells}
    new = {str(cell.cell["cell_id"]): cell for cell in after.result.cells}
    return [(cell_id, old[cell_id], cell) for cell_id, cell in new.items() if cell_id in old]


def _labels(result: SweepResult) -> str:
    return ", ".join(cell.label for cell in result.cells[:3]) + (", ..." if len(result.cells) > 3 else "")


def _evidence(key: tuple[str, str], before: JudgedSweep, after: JudgedSweep) -> ChangeEvidence | None:
    cell_id, arm = key
    sides = []
    for sweep in (before, after):
        record = next(record for record in sweep.records if record.cell["cell_id"] == cell_id)
        evidence = evidence_in(record, sweep.spec).get(arm)
        if evidence is None:
            return None
        sides.append(evidence)
    return ChangeEvidence(*sides)


def _row(arm: str, old: CellResult, new: CellResult, change: Comparison | None, indifference_pct: float) -> Change:
    wrong = [(words, cell) for words, cell in (("before", old), ("after", new)) if cell.is_invalid]
    if wrong:
        reason = "; ".join(f"{words}: {cell.faults[0].arm}: {cell.faults[0].detail}" for words, cell in wrong)
        judgement = Judgement(Verdict.INVALID, reason=reason)
    else:
        judgement = judge(change, indifference_pct)
    ours, theirs = ({result.arm: result for result in cell.arms} for cell in (new, old))
    return Change(
        cell_id=str(new.cell["cell_id"]),
        label=new.label,
        arm=arm,
        judgement=judgement,
        change=change,
        before=theirs[arm],
        after=ours[arm],
        baseline_before=theirs[BASELINE_ARM],
        baseline_after=ours[BASELINE_ARM],
    )


def _only(one: JudgedSweep, other: JudgedSweep) -> tuple[str, ...]:
    """Cells, and arms, that only `one` has."""
    known = {cell.cell["cell_id"] for cell in other.result.cells}
    cells = [f"cell {cell.label}" for cell in one.result.cells if cell.cell["cell_id"] not in known]
    return (*cells, *(f"arm {name}" for name in one.spec.arms if name not in other.spec.arms))


def _notes(before: JudgedSweep, after: JudgedSweep, pairs: Sequence[tuple[str, CellResult, CellResult]]) -> list[str]:
    notes = []
    for name, arm in after.spec.arms.items():
        differs: Mapping[str, tuple[str, str]] = arm.differs_from(before.spec.arms[name]) if name in before.spec.arms else {}
        notes += [f"arm {name}: {factor} was {was}, is {now}" for factor, (was, now) in differs.items()]
    notes += [
        f"{new.label}: the path that ran was {old.path}, is {new.path}"
        for _, old, new in pairs
        if old.path and new.path and old.path != new.path
    ]
    if before.spec.weights != after.spec.weights:
        notes.append("the weights are not the same (weights)")
    if before.spec.placement != after.spec.placement:
        notes.append("the placement is not the same (placement)")
    for sweep in (before.result, after.result):
        if sweep.aa.flagged:
            notes.append(
                f"A/A FLAGGED in {sweep.sweep_id}, do not trust it: equal code looked different in {', '.join(sweep.aa.flagged)}"
            )
        if sweep.failure:
            notes.append(f"{sweep.sweep_id} ended {sweep.status}: {sweep.failure.splitlines()[0]}")
    return notes
