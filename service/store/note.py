"""The summary run's note and its full table, in Markdown: what a reviewer reads first in the dashboard."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from experiments.names import Verdict
from service.judge.results import ArmResult, CellResult, SweepResult
from service.report.caveats import caveats
from service.report.table import (
    aa_words,
    bounds,
    count_cells,
    counted_words,
    hardware,
    headings,
    percent,
    rows,
    share,
    verdict_words,
)

MAX_NOTE_BYTES = 7600
"""MLflow cuts a tag at 8,000 characters; bytes are never fewer than characters."""

_MAX_CAVEATS_BYTES = 2200
_MAX_LINE_BYTES = 400
_URGENCY = {Verdict.INVALID: 0, Verdict.SLOWER: 1, Verdict.FASTER: 1, Verdict.UNRESOLVED: 2, Verdict.SAME: 3}


def full_table(result: SweepResult) -> str:
    """Every row and every caveat, as Markdown."""
    table = _table(headings(result.confidence), rows(result))
    return "\n\n".join([*_opening(result), *_bullets(caveats(result)), table]) + "\n"


def note(result: SweepResult, links: str = "", title: str = "") -> str:
    """What fits below MLflow's limit: the verdicts in words, links, hardware, caveats, and the decisive rows.

    All rows in the order of the grid when they fit; else the compared arms alone, the most urgent first (INVALID, then what
    differs, by the size of the effect), as many as fit.

    Args:
        links: Lines of links, short enough to leave room for the rest.
        title: How the night ended, where the sweep is one and its end is known.
    """
    names = ("cell", "arm", "verdict", f"time ratio [{percent(result.confidence)} %]", "tokens/s", "hidden")
    # MLflow folds a note after a few lines: how it ended and where to go on come first.
    head = [*([f"**{_cut(title)}**"] if title else []), *([links] if links else []), _verdicts(result)]
    # Lines over lines of caveats (one for each cell that failed) must not push the verdicts out.
    top = "\n\n".join([*head, *_opening(result), *_bullets(_first(caveats(result), _MAX_CAVEATS_BYTES))])
    every = [(cell, arm) for cell in result.cells for arm in cell.arms]
    whole = f"{top}\n\n{_table(names, [_row(*pair) for pair in every])}\n\nFull table: `table.md`.\n"
    if len(whole.encode()) <= MAX_NOTE_BYTES:
        return whole
    decisive = sorted((pair for pair in every if pair[1].verdict is not None), key=_urgency)
    kept = [_row(*pair) for pair in decisive]
    while True:
        rest = len(every) - len(kept)
        text = f"{top}\n\n{_table(names, kept)}\n\nThe most decisive {len(kept)} rows; the other {rest} are in `table.md`.\n"
        if len(text.encode()) <= MAX_NOTE_BYTES or not kept:
            return text
        kept = kept[:-1]


def _verdicts(result: SweepResult) -> str:
    """What came out, in one line."""
    arms = [arm for cell in result.cells for arm in cell.arms if arm.verdict is not None]
    words = counted_words(arms)
    return (
        f"**{words}**, of {len(arms)} arms compared in {count_cells(len(result.cells))}."
        if words
        else "**Nothing was compared.**"
    )


def _opening(result: SweepResult) -> list[str]:
    """What ran, when, how it ended, and on what."""
    return [
        f"**{result.experiment}**, sweep `{result.sweep_id}`, {result.status}, {result.started_at} to {result.ended_at or '?'},"
        f" methodology {result.methodology_version}",
        f"Measured on: {_cut(hardware(result))}. A/A: {aa_words(result.aa)}.",
    ]


def _row(cell: CellResult, arm: ArmResult) -> tuple[str, ...]:
    ratio = arm.comparison.ratio if arm.comparison and not cell.is_invalid else None
    account = None if cell.is_invalid else arm.account
    return (
        cell.label,
        arm.arm,
        verdict_words(arm),
        f"{ratio.estimate:.3f} [{bounds(ratio)}]" if ratio else "",
        f"{arm.tokens_per_s:,.0f}" if arm.tokens_per_s and not cell.is_invalid else "",
        share(account.hidden) if account and arm.comparison else "",
    )


def _urgency(pair: tuple[CellResult, ArmResult]) -> tuple[int, float]:
    arm = pair[1]
    size = abs(math.log(arm.comparison.ratio.estimate)) if arm.comparison else 0.0
    return _URGENCY[arm.verdict] if arm.verdict is not None else len(_URGENCY), -size


def _table(names: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "\n".join([_line(names), _line(["---"] * len(names)), *(_line(line) for line in lines)])


def _line(values: Iterable[str]) -> str:
    return f"| {' | '.join(_escape(value) for value in values)} |"


def _escape(text: str) -> str:
    """One line that cannot end a table's cell."""
    return " ".join(text.split()).replace("|", "\\|")


def _bullets(lines: Sequence[str]) -> list[str]:
    return ["\n".join(f"- {_cut(_escape(line))}" for line in lines)] if lines else []


def _cut(text: str) -> str:
    if len(text.encode()) <= _MAX_LINE_BYTES:
        return text
    return text.encode()[: _MAX_LINE_BYTES - 4].decode(errors="ignore") + " ..."


def _first(lines: Sequence[str], max_bytes: int) -> list[str]:
    """As many lines, each cut, as fit; the last one says how many do not."""
    kept: list[str] = []
    left = max_bytes
    for line in lines:
        left -= len(_cut(line).encode()) + 3
        if left < 0:
            return [*kept, f"{len(lines) - len(kept)} more in `table.md`"]
        kept.append(line)
    return kept
