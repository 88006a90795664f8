"""What a night comes to: one word, and the exit code that goes with it."""

from __future__ import annotations

from enum import StrEnum

from experiments.names import BASELINE_ARM, SweepStatus
from experiments.spec.experiment import ExperimentSpec
from service.errors import ExitCode
from service.history.suspect import Reading, Suspect
from service.judge.results import CellResult, SweepResult


class NightStatus(StrEnum):
    """In words for people; `EXIT_CODES` has them for machines."""

    FINE = "FINE"
    YOUNG = "YOUNG"
    """Whole, and too few nights before it to be judged beside them."""
    MOVED = "MOVED"
    """Both arms' times moved and the ratios held: the machine, or code that all arms share. Times are never judged, so it fails nothing."""
    REGRESSION = "REGRESSION"
    """An arm's ratio got worse, on this night or on an earlier one, and is not back."""
    UNTRUSTED = "UNTRUSTED"
    """A ratio got worse together with the environment, or an A/A pair moved: the night cannot say whose doing it is."""
    PARTIAL = "PARTIAL"
    """Something of the plan was not measured, or a cell is INVALID."""
    FAILED = "FAILED"
    """The sweep did not come to its end."""


EXIT_CODES = {
    NightStatus.FINE: ExitCode.FINE,
    NightStatus.YOUNG: ExitCode.FINE,
    NightStatus.MOVED: ExitCode.FINE,
    NightStatus.REGRESSION: ExitCode.REGRESSION,
    NightStatus.UNTRUSTED: ExitCode.INVALID,
    NightStatus.PARTIAL: ExitCode.INVALID,
    NightStatus.FAILED: ExitCode.INFRASTRUCTURE,
}


def missing(result: SweepResult, spec: ExperimentSpec) -> list[str]:
    """What of the plan is not there, in words; nothing of a whole night."""
    planned = [cell.label for cell in spec.expand().cells]
    there = {cell.label for cell in result.cells}
    gone = [f"{label}: not measured" for label in planned if label not in there]
    gone += [f"{cell.label}: {words}" for cell in result.cells if (words := _wrong(cell, spec))]
    return gone or ([] if planned else ["there is no cell"])


def _wrong(cell: CellResult, spec: ExperimentSpec) -> str:
    if cell.faults:
        return f"INVALID: {cell.faults[0].arm}: {cell.faults[0].detail}"
    if cell.failure:
        return f"given up: {cell.failure.splitlines()[0]}"
    if not cell.is_measured:
        return "not every arm was measured"
    if cell.launches < spec.measurement.launches:
        return f"{cell.launches} of {spec.measurement.launches} launches"
    arms = [arm for arm in cell.arms if arm.arm != BASELINE_ARM]
    return "" if all(arm.comparison is not None for arm in arms) else "not every arm was compared"


def status_of(result: SweepResult | None, gone: list[str], reading: Reading) -> NightStatus:
    """The gravest of what is true. A regression that was measured stands also where something else is missing."""
    if result is None or result.status is not SweepStatus.FINISHED:
        return NightStatus.FAILED
    worse = [finding for finding in reading.findings if finding.is_worse]
    if any(finding.suspect is Suspect.CODE for finding in worse):
        return NightStatus.REGRESSION
    if gone:
        return NightStatus.PARTIAL
    if worse or reading.untrusted:
        return NightStatus.UNTRUSTED
    if any(finding.ratio is None for finding in reading.findings):
        return NightStatus.MOVED
    return NightStatus.FINE if reading.judged else NightStatus.YOUNG
