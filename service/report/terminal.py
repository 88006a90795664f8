"""Prints a result: a table that fits a terminal, plain columns in a job's log."""

from __future__ import annotations

import sys

from service.judge.results import SweepResult
from service.report.caveats import caveats
from service.report.table import aa_words, hardware, headings, rows


def print_result(result: SweepResult) -> None:
    """The verdict table, the hardware, and what to mind."""
    if sys.stdout.isatty():
        _print_rich(result)
    else:
        _print_plain(result)
    print(f"measured on: {hardware(result)}")
    print(f"A/A: {aa_words(result.aa)}")
    for line in caveats(result):
        print(f"note: {line}")


def _print_rich(result: SweepResult) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{result.experiment} {result.sweep_id}", show_lines=False)
    for index, heading in enumerate(headings(result.confidence)):
        table.add_column(heading, justify="left" if index < 3 else "right", overflow="fold")
    colours = {"FASTER": "green", "SLOWER": "red", "INVALID": "bold red", "UNRESOLVED": "yellow"}
    for row in rows(result):
        table.add_row(*row, style=colours.get(row[2].split()[0] if row[2] else "", ""))
    Console().print(table)


def _print_plain(result: SweepResult) -> None:
    lines = [headings(result.confidence), *rows(result)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for line in lines:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())
