"""What two sweeps say of each other: the table of changes as text, and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from experiments.names import Verdict
from service.judge.change import Change, Changes
from service.judge.results import ArmResult, SweepResult
from service.report.json_report import json_text
from service.report.table import bounds, hardware, percent

SCHEMA = 1


def change_rows(changes: Changes) -> list[tuple[str, ...]]:
    """Headings and one row for each (cell, arm), as text."""
    interval = f"{percent(changes.confidence)} % interval"
    headings = (
        "cell",
        "arm",
        "change is",
        "ratio before",
        "ratio after",
        "ratio of ratios",
        interval,
        "p50 ms before, after (not judged)",
    )
    return [headings, *(_row(change) for change in changes.rows)]


def _row(row: Change) -> tuple[str, ...]:
    is_invalid = row.judgement.verdict is Verdict.INVALID
    change = row.change.ratio if row.change is not None and not is_invalid else None
    times = (
        "" if is_invalid else f"{_p50(row.baseline_before)} / {_p50(row.before)}, {_p50(row.baseline_after)} / {_p50(row.after)}"
    )
    return (
        row.label,
        row.arm,
        row.judgement.words,
        _ratio(row.before),
        _ratio(row.after),
        f"{change.estimate:.3f}" if change is not None else "",
        bounds(change) if change is not None else "",
        times,
    )


def _ratio(arm: ArmResult) -> str:
    if arm.comparison is None:
        return "INVALID" if arm.verdict is Verdict.INVALID else ""
    return f"{arm.comparison.ratio.estimate:.3f} [{bounds(arm.comparison.ratio)}]"


def _p50(arm: ArmResult) -> str:
    return f"{arm.latency.p50_us / 1e3:.2f}" if arm.latency is not None else "?"


def change_lines(changes: Changes, machine_differs: list[str]) -> list[str]:
    """All that is printed: which sweeps, the table, reasons, and what to mind."""
    table = change_rows(changes)
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    lines = [_about("before", changes.before), _about("after", changes.after)]
    lines += ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in table]
    lines.append(
        "ratio: arm / baseline of the same sweep; p50: baseline / arm. FASTER: the arm's ratio has fallen; SLOWER: it has risen"
    )
    lines += [
        f"{row.judgement.verdict} {row.arm} {row.label}: {row.judgement.reason}" for row in changes.rows if row.judgement.reason
    ]
    lines += [f"only before: {name}" for name in changes.only_before]
    lines += [f"only after: {name}" for name in changes.only_after]
    lines += [f"note: OTHER HARDWARE, compared all the same (--any-hardware): {words}" for words in machine_differs]
    return lines + [f"note: {words}" for words in changes.notes]


def _about(word: str, result: SweepResult) -> str:
    dirty = " with uncommitted changes" if result.environment.get("dirty") else ""
    return (
        f"{word + ':':8s}{result.experiment} {result.sweep_id}, {result.status}, {result.started_at}; {hardware(result)}{dirty}"
    )


def changes_json(changes: Changes, machine_differs: list[str]) -> str:
    """The same as JSON. The README has the schema."""
    return json_text(
        {
            "schema": SCHEMA,
            "before": _identity(changes.before),
            "after": _identity(changes.after),
            "confidence": changes.confidence,
            "rows": [_values(row) for row in changes.rows],
            "only_before": changes.only_before,
            "only_after": changes.only_after,
            "other_hardware": machine_differs,
            "notes": changes.notes,
        }
    )


def _identity(result: SweepResult) -> dict[str, Any]:
    env = result.environment
    return {
        "sweep_id": result.sweep_id,
        "experiment": result.experiment,
        "status": result.status,
        "spec_hash": result.spec_hash,
        "methodology_version": result.methodology_version,
        "revision": env.get("revision"),
        "dirty": env.get("dirty"),
        "source_digest": env.get("source_digest"),
    }


def _values(row: Change) -> dict[str, Any]:
    def side(arm: ArmResult, baseline: ArmResult) -> dict[str, Any]:
        return {
            "verdict": arm.verdict,
            "ratio": asdict(arm.comparison.ratio) if arm.comparison is not None else None,
            "p50_us": arm.latency.p50_us if arm.latency is not None else None,
            "baseline_p50_us": baseline.latency.p50_us if baseline.latency is not None else None,
        }

    return {
        "cell_id": row.cell_id,
        "label": row.label,
        "arm": row.arm,
        "verdict": row.judgement.verdict,
        "is_small": row.judgement.is_small,
        "may_be_small": row.judgement.may_be_small,
        "reason": row.judgement.reason,
        "change": asdict(row.change) if row.change is not None else None,
        "before": side(row.before, row.baseline_before),
        "after": side(row.after, row.baseline_after),
    }
