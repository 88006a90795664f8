"""Reproduction: the spec that the records hold, run again. The stored spec is the truth, whatever the catalogue says by now."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from experiments import catalogue
from experiments.errors import SpecError, UserError
from experiments.names import METHODOLOGY_VERSION
from experiments.spec.experiment import ExperimentSpec
from service.machine import code_of, differences, machine_of
from service.store.records import Records


def stored_spec(records: Records, sweep_id: str, cell_id: str | None = None) -> ExperimentSpec:
    """The spec of a sweep, or of one cell of it.

    Raises:
        UserError: It was measured under another methodology, has no such cell, or does not make the same cells any more.
    """
    row = records.sweep(sweep_id)
    if row["methodology_version"] != METHODOLOGY_VERSION:
        raise UserError(
            f"SWEEP: {sweep_id} was measured under methodology {row['methodology_version']}, this version has {METHODOLOGY_VERSION}: its figures "
            f"would mean something else; use the version of cplab that measured it (revision {row['environment'].get('revision')})"
        )
    spec = catalogue.validate(row["spec"], source=f"SWEEP: the stored spec of {sweep_id}")
    then = [str(record.cell["cell_id"]) for record in records.cells(sweep_id)]
    if cell_id is not None and cell_id not in then:
        raise UserError(f"--cell: no cell {cell_id!r} in sweep {sweep_id}; it has: {', '.join(then)}")
    if set(then) != _cell_ids(spec):
        source = "its trace file has changed" if row["replay"] else "what a cell is has changed"
        raise UserError(
            f"SWEEP: the stored spec of {sweep_id} makes other cells than it did: {source} since; nothing was started"
        )
    return spec if cell_id is None else only_cell(spec, cell_id)


def only_cell(spec: ExperimentSpec, cell_id: str) -> ExperimentSpec:
    """The spec with every axis cut down to the one value that `cell_id` has, whatever axes there are."""
    content: dict[str, Any] | None = spec.model_dump(mode="json")
    while content is not None:
        narrowed, content = content, _narrower(content, cell_id)
    assert _cells_of(narrowed) == {cell_id}, f"{cell_id} is not one point of {spec.name}'s axes"
    return ExperimentSpec.model_validate(narrowed)


def _narrower(content: dict[str, Any], cell_id: str) -> dict[str, Any] | None:
    """One axis narrower, and `cell_id` still in it; None when that is no longer possible.

    Axes depend on each other: a value of one may be refused beside some of another, and a cell may be without an axis that others
    have, which then goes back to its default.
    """
    now = _cells_of(content)
    axes = [(section, key) for section in ("workload", "cells") for key, v in content[section].items() if isinstance(v, list)]
    cuts = [(section, key, [value]) for section, key in axes for value in content[section][key] if len(content[section][key]) > 1]
    for section, key, values in [*cuts, *((section, key, None) for section, key in axes if len(now) > 1)]:
        candidate = copy.deepcopy(content)
        if values is None:
            del candidate[section][key]
        else:
            candidate[section][key] = values
        if cell_id in _cells_of(candidate):
            return candidate
    return None


def _cells_of(content: Mapping[str, Any]) -> set[str]:
    """Ids; none where the values do not go together."""
    try:
        return _cell_ids(ExperimentSpec.model_validate(content))
    except (ValidationError, SpecError):
        return set()


def _cell_ids(spec: ExperimentSpec) -> set[str]:
    return {cell.cell_id for cell in spec.expand().cells}


def drift(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What is not as it was: revision, versions, hardware; in words for the user."""
    lines = differences(code_of(then), code_of(now)) + differences(machine_of(then), machine_of(now))
    if then.get("dirty"):
        lines.append("it was measured with uncommitted changes")
    return lines
