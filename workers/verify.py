"""Right first: what a rank checks of a cell before and after it is timed.

Every arm against `serial`, bit for bit, over all inputs in rotation, into poisoned destinations, once with each of the lanes held back so that
no race is won by luck; the selections of all rows by structure; and once a cell `serial` itself against the references.

Legend: T rows on this rank, S step tokens, K top-k.
"""

from __future__ import annotations

import torch

from experiments.names import AA_ARM, Device, Lane, Scope
from experiments.spec.measurement import VerifySpec
from workers.collective_log import is_of_a_collective
from workers.digest import digest
from workers.fabrics.exchange import ScheduleError
from workers.indexer.gates import check_topk_structure
from workers.indexer.stage_sets import StageSettings
from workers.messages import Fault, Variant, VerifyReport
from workers.oracle import ReferenceReport, check_against_references
from workers.outcome import Outcome, Selected
from workers.prepared_cell import PreparedCell
from workers.wrapped_lanes import LateLanes, on_lanes

MAX_FULL_STEPS = 6
"""Steps of a replay that are checked through top-k; all of them are checked through q and k while they are timed."""


class ArmError(Exception):
    """An arm's schedule raised, or broke a schedule's contract."""

    def __init__(self, arm: str, cause: BaseException) -> None:
        super().__init__(str(cause) if isinstance(cause, ScheduleError) else f"{type(cause).__name__}: {cause}")
        self.arm = arm


def run_arm(cell: PreparedCell, variant: Variant, step: int, index: int, scope: Scope) -> Outcome:
    """One run of a variant; what its schedule raises is the arm's fault.

    Raises:
        ArmError: The schedule raised. The other ranks may wait in its gather: the group can not be used any more.
    """
    try:
        return cell.run(variant, step, index, scope)
    except (TimeoutError, torch.AcceleratorError):
        raise  # what a GPU reports may be its arm's doing, or what a peer that died has left behind
    except RuntimeError as error:
        if is_of_a_collective(str(error)):
            raise  # no arm's fault
        raise ArmError(variant.arm, error) from error
    except Exception as error:
        raise ArmError(variant.arm, error) from error


def verify_cell(cell: PreparedCell, plan: VerifySpec, rank: int, deep: bool, late: bool = True) -> VerifyReport:
    """All checks of this rank; in step on all ranks, since most of them gather."""
    if cell.cell.device is Device.SIMULATED:
        # Planted times have no values to check; what can be checked is that every schedule keeps the contract of one.
        outcomes = [(arm, run_arm(cell, Variant(arm), 0, cell.next_input(), Scope.INDEXER)) for arm in cell.arms]
        faults = tuple(Fault(arm, "contract", outcome.fault) for arm, outcome in outcomes if outcome.fault is not None)
        return VerifyReport(rank, faults, (), num_checks=len(cell.arms))
    check = _Check(cell, plan)
    # The second copy of the baseline is the first one's text on the same buffers.
    arms = [arm for arm in cell.arms if arm != AA_ARM]
    steps = sampled_steps(len(cell.steps))
    for step in steps:
        num_inputs = cell.pool.num_inputs
        for index in range(num_inputs):
            for settings in cell.all_settings:
                check.serial(settings, step, index)
        # Neighbouring runs never share inputs: with fixed ones a missing wait reads the last run's identical keys.
        for turn in range(num_inputs if deep else 1):
            # Every other turn backwards, or the last of one and the first of the next might share theirs.
            for offset, arm in list(enumerate(arms))[:: -1 if turn % 2 else 1]:
                check.arm(arm, step, (turn + offset) % num_inputs)
    longest = max(steps, key=lambda i: cell.cell.steps[i].new_tokens)
    for late_lane in Lane if late else ():
        for arm in arms:
            check.arm_with_a_late_lane(arm, longest, late_lane)
    report: ReferenceReport | None = None
    for settings in reversed(cell.all_settings) if deep else ():  # the baseline's last: its figures are the report's
        report = check_against_references(cell, longest, plan.rows_per_rank, settings)
        check.faults += report.faults
        check.num_checks += report.num_checks
    return VerifyReport(
        rank=rank,
        faults=tuple(check.faults),
        key_digests=tuple(check.key_digests),
        num_checks=check.num_checks,
        recall=report.recall if report else None,
        recall_unrounded=report.recall_unrounded if report else None,
        gates=report.gates if report else (),
    )


def sampled_steps(num_steps: int) -> list[int]:
    """Up to MAX_FULL_STEPS steps, evenly spread, the first and the last among them."""
    if num_steps <= MAX_FULL_STEPS:
        return list(range(num_steps))
    return sorted({round(i * (num_steps - 1) / (MAX_FULL_STEPS - 1)) for i in range(MAX_FULL_STEPS)})


class _Check:
    """Collects faults and counts comparisons."""

    def __init__(self, cell: PreparedCell, plan: VerifySpec) -> None:
        self.cell, self.plan = cell, plan
        self.faults: list[Fault] = []
        self.key_digests: list[int] = []
        self.num_checks = 0

    def serial(self, settings: StageSettings, step: int, index: int) -> None:
        """`serial` through top-k: what every arm of those stages is held against, and its own selections by structure; made once a launch."""
        cell, key = self.cell, (settings, step, index)
        correct = cell.correct(step, index, settings)
        if key in cell.selected:
            self.key_digests += [correct.k, cell.selected[key].keys]
            return
        topk = cell.finish_correct(step, index, settings=settings)
        cell.selected[key] = Selected(digest_keys(cell, step), digest(topk))
        self.key_digests += [correct.k, cell.selected[key].keys]
        form = check_topk_structure(topk, cell.visible_keys(step), cell.cell.dims.topk)
        if not form.ok:
            self.faults.append(Fault("*", "top-k", f"step {step}, input {index}: {form.detail}"))
        self.num_checks += 1

    def arm(self, arm: str, step: int, index: int) -> None:
        """One arm through top-k, bit for bit."""
        cell = self.cell
        outcome = run_arm(cell, Variant(arm), step, index, Scope.INDEXER)
        self._hold(arm, "bits", outcome, step, index)
        assert outcome.topk is not None
        right = cell.selected[cell.settings_of[arm], step, index]
        if digest_keys(cell, step) != right.keys:
            self.faults.append(Fault(arm, "bits", f"index keys of step {step}, input {index}: not the bits of serial"))
        if digest(outcome.topk) != right.topk:
            self.faults.append(Fault(arm, "bits", f"top-k of step {step}, input {index}: not the bits of serial"))
        self.num_checks += 4

    def arm_with_a_late_lane(self, arm: str, step: int, late: Lane) -> None:
        """The same with a lane held back behind every fork, so that neither a missing wait nor a race for a buffer passes by luck."""
        cell = self.cell
        index = cell.next_input()
        cell.correct(step, index, cell.settings_of[arm])
        with on_lanes(cell, LateLanes(cell.lanes, late, self.plan.delay_ms * 1e3)):
            outcome = run_arm(cell, Variant(arm), step, index, Scope.QK)
        self._hold(arm, f"late {late} lane", outcome, step, index)
        self.num_checks += 2

    def _hold(self, arm: str, check: str, outcome: Outcome, step: int, index: int) -> None:
        if problem := self.cell.problem(arm, outcome, step, index):
            self.faults.append(Fault(arm, check, problem))


def digest_keys(cell: PreparedCell, step: int) -> int:
    """Digest of the quantised index keys in a step's cache, fp8 and scale."""
    cache = cell.stored_cache(step)
    return digest(cache.values_ND) ^ digest(cache.scale_N)
