"""The summary of a night: what a person reads in ten seconds, as Markdown, and the same for machines as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date, timedelta
from typing import Any

from experiments.names import BASELINE_ARM
from service.errors import ExitCode
from service.history.series import Point
from service.history.store import Blessing
from service.history.suspect import MIN_NIGHTS, Finding, Move, Reading, Suspect
from service.judge.results import SweepResult
from service.nightly.verdict import NightStatus
from service.report.table import bounds

SCHEMA = 1
"""Rises when a key of the JSON changes its meaning or goes."""

MAX_MISSED = 7


@dataclass(frozen=True)
class NightSummary:
    """All that is known of a night.

    Attributes:
        result: None where no sweep came to be.
        failure: Why the night failed; empty otherwise.
        gone: What of the plan is missing.
        missed: Dates since the night before that have none.
        differences: (last good night, first bad night) -> what is not the same of their environments.
        num_nights: Nights of this experiment, this one included.
    """

    experiment: str
    night: str
    status: NightStatus
    exit_code: ExitCode
    result: SweepResult | None
    failure: str
    gone: tuple[str, ...]
    reading: Reading
    missed: tuple[str, ...]
    differences: Mapping[tuple[str, str], Sequence[str]]
    blessing: Blessing | None
    num_nights: int

    @property
    def title(self) -> str:
        """One line, with the gravest thing first."""
        return f"CP Lab {self.experiment} {self.night}: {self.status}: {self._gist}"

    @property
    def _gist(self) -> str:
        worse = [f for f in self.reading.findings if f.is_worse]
        match self.status:
            case NightStatus.FAILED:
                return self.failure or "nothing was measured"
            case NightStatus.PARTIAL:
                return f"{len(self.gone)} of the plan is missing: {self.gone[0]}"
            case NightStatus.REGRESSION:
                code = [f for f in worse if f.suspect is Suspect.CODE]
                largest = max(code, key=lambda f: f.ratio.log if f.ratio else 0)
                more = f" and {len(code) - 1} more" if len(code) > 1 else ""
                return f"{finding_words(largest)}{more}"
            case NightStatus.UNTRUSTED if worse:
                return f"{finding_words(worse[0])}: measure again before blaming anybody"
            case NightStatus.UNTRUSTED:
                return f"equal code looked different in {self.reading.untrusted[0][0]}: do not trust this night"
            case NightStatus.MOVED:
                times = next(f for f in self.reading.findings if f.ratio is None)
                return f"{finding_words(times)}; the ratios held"
            case NightStatus.YOUNG:
                return f"measured; {self.num_nights} of {MIN_NIGHTS} nights that a judgement needs"
            case NightStatus.FINE:
                return f"{self.reading.judged} ratios are where they were"


def finding_words(finding: Finding) -> str:
    """What moved, since when, and who is to be asked."""
    where = f"{finding.arm} in {finding.label}" if finding.label else "all cells"
    if finding.ratio is None:
        what = f"times {_signed(finding.baseline)}"
    else:
        what = f"ratio {_signed(finding.ratio)} ({'worse' if finding.is_worse else 'better'})"
    return f"{where}: {what} since {finding.first_bad.night}, suspect {finding.suspect}"


def _signed(move: Move | None) -> str:
    return f"{move.pct:+.1f} %" if move is not None else "?"


def missed_nights(night: str, before: str | None) -> tuple[str, ...]:
    """Dates between two nights that have none; at most a week of them, since an experiment may rest."""
    try:
        first, last = date.fromisoformat((before or night)[:10]), date.fromisoformat(night[:10])
    except ValueError:
        return ()
    days = [first + timedelta(days=i) for i in range(1, (last - first).days)]
    return tuple(day.isoformat() for day in days[-MAX_MISSED:])


def markdown(summary: NightSummary) -> str:
    """The whole summary."""
    lines = [f"# {summary.title}", ""]
    lines += [line for f in summary.reading.findings for line in _finding_lines(f, summary)]
    lines += [f"- A/A moved in {label} (p {p:.1g}): equal code looked different" for label, p in summary.reading.untrusted]
    lines += [f"- missing: {words}" for words in summary.gone]
    lines += [f"- MISSED: no night of {day}" for day in summary.missed]
    if summary.reading.young and summary.reading.judged:
        lines.append(f"- not judged yet (fewer than {MIN_NIGHTS} nights): {', '.join(summary.reading.young)}")
    if lines[-1]:
        lines.append("")
    if summary.result is not None:
        lines += _table(summary, summary.result)
    if summary.blessing is not None:
        lines.append(f"Reference: the night {summary.blessing.night}, blessed by {summary.blessing.who}: {summary.blessing.why}")
    lines.append(f"Exit code {int(summary.exit_code)}; night {summary.num_nights} of this experiment.")
    return "\n".join(lines) + "\n"


def _finding_lines(finding: Finding, summary: NightSummary) -> list[str]:
    good, bad = finding.last_good, finding.first_bad
    lines = [f"- **{finding_words(finding)}**"]
    if finding.ratio is not None and finding.baseline is not None and finding.other is not None:
        lines.append(f"  - times at that night: baseline {_signed(finding.baseline)}, {finding.arm} {_signed(finding.other)}")
    differs = summary.differences.get((good.sweep_id, bad.sweep_id), ())
    lines.append(f"  - last good night {good.night} ({good.sweep_id}), first bad {bad.night} ({bad.sweep_id})")
    lines += [f"  - {words}" for words in differs] or ["  - no difference of code or environment was noted between them"]
    lines.append(f"  - side by side: `cplab compare {good.sweep_id} {bad.sweep_id}`")
    return lines


def _table(summary: NightSummary, result: SweepResult) -> list[str]:
    detectable = {(key.cell_id, key.arm): pct for key, pct in summary.reading.detectable_pct.items()}
    lines = ["| cell | arm | verdict | ratio | interval | a step to be seen |", "| --- | --- | --- | --- | --- | --- |"]
    for cell in result.cells:
        for arm in cell.arms:
            if arm.arm == BASELINE_ARM:
                continue
            ratio = arm.comparison.ratio if arm.comparison is not None and not cell.is_invalid else None
            pct = detectable.get((str(cell.cell["cell_id"]), arm.arm))
            figures = (f"{ratio.estimate:.3f}", bounds(ratio)) if ratio is not None else ("", "")
            seen = f"{pct:.1f} %" if pct is not None else "not judged yet"
            lines.append(f"| {cell.label} | {arm.arm} | {arm.verdict} | {figures[0]} | {figures[1]} | {seen} |")
    revision = str(result.environment.get("revision"))[:12]
    dirty = " with uncommitted changes" if result.environment.get("dirty") else ""
    return [*lines, "", f"Sweep {result.sweep_id}, {result.started_at} to {result.ended_at}, revision {revision}{dirty}."]


def summary_values(summary: NightSummary) -> dict[str, Any]:
    """The JSON. The README has its keys."""
    result = summary.result
    return {
        "schema": SCHEMA,
        "experiment": summary.experiment,
        "night": summary.night,
        "status": summary.status,
        "exit_code": int(summary.exit_code),
        "title": summary.title,
        "sweep_id": result.sweep_id if result is not None else None,
        "revision": result.environment.get("revision") if result is not None else None,
        "failure": summary.failure,
        "missing": list(summary.gone),
        "missed_nights": list(summary.missed),
        "untrusted": [{"cell": label, "p_value": p} for label, p in summary.reading.untrusted],
        "young": list(summary.reading.young),
        "num_judged": summary.reading.judged,
        "num_nights": summary.num_nights,
        "blessed": asdict(summary.blessing) if summary.blessing is not None else None,
        "findings": [_finding_values(f, summary) for f in summary.reading.findings],
    }


def _finding_values(finding: Finding, summary: NightSummary) -> dict[str, Any]:
    good, bad = finding.last_good, finding.first_bad
    return {
        "suspect": finding.suspect,
        "cell": finding.label,
        "cell_id": finding.cell_id,
        "arm": finding.arm,
        "ratio": _move_values(finding.ratio),
        "baseline": _move_values(finding.baseline),
        "arm_time": _move_values(finding.other),
        "is_worse": finding.is_worse,
        "is_new": finding.is_new,
        "last_good": {"night": good.night, "sweep_id": good.sweep_id},
        "first_bad": {"night": bad.night, "sweep_id": bad.sweep_id},
        "nights": finding.nights,
        "level_before": finding.before,
        "setting": finding.setting,
        "differences": list(summary.differences.get((good.sweep_id, bad.sweep_id), ())),
    }


def _move_values(move: Move | None) -> dict[str, float] | None:
    return None if move is None else {"pct": move.pct, "log": move.log, "error": move.error}


def findings_from(values: Mapping[str, Any]) -> tuple[Finding, ...]:
    """The findings of a summary's JSON, for the night after."""

    def move(found: Mapping[str, float] | None) -> Move | None:
        return None if found is None else Move(found["log"], found["error"])

    def point(found: Mapping[str, str]) -> Point:
        return Point(found["night"], found["sweep_id"], {})

    return tuple(
        Finding(
            suspect=Suspect(f["suspect"]),
            label=f["cell"],
            cell_id=f["cell_id"],
            arm=f["arm"],
            ratio=move(f["ratio"]),
            baseline=move(f["baseline"]),
            other=move(f["arm_time"]),
            last_good=point(f["last_good"]),
            first_bad=point(f["first_bad"]),
            nights=f["nights"],
            before=f["level_before"],
            setting=f["setting"],
        )
        for f in values["findings"]
    )
