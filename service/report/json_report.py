"""A result as JSON that every reader takes: what `--json` writes and MLflow keeps. The README has the schema."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from service.judge.projection import Layer, ProjectedArm
from service.judge.results import SweepResult

SCHEMA = 2
"""Rises when a key changes its meaning or goes."""


def result_json(result: SweepResult, projection: Mapping[str, Any] | None = None) -> str:
    """The whole sweep; cells carry their coordinates and their arms. `projection` goes along when there is one."""
    values = asdict(result)
    values["cells"] = [{**cell.pop("cell"), "valid": not cell["faults"], **cell} for cell in values["cells"]]
    return json_text({"schema": SCHEMA, **values, **({"projection": projection} if projection is not None else {})})


def projection_values(layer: Layer, projections: Sequence[ProjectedArm]) -> dict[str, Any]:
    """The value of `projection`: the layer as it was given, and a row for each (cell, arm)."""
    return {
        "layer": asdict(layer),
        "arms": [{**asdict(p), "words": p.projection.words, "is_small": p.projection.is_small} for p in projections],
    }


def json_text(value: Any) -> str:
    """JSON without NaN or Infinity: a bound that bounds nothing is null."""
    return json.dumps(_plain(value), indent=1, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)
