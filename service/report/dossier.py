"""A dossier: all that one page says about a sweep, read once, from wherever the sweep is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from experiments.spec.experiment import ExperimentSpec
from service.judge.projection import Layer, ProjectedArm, project_sweep
from service.judge.results import SweepResult
from service.store.judged import load_result, utc
from service.store.records import Records
from service.store.source import Source


@dataclass(frozen=True)
class Dossier:
    """One sweep.

    Attributes:
        settlings: How every launch's warm-up of every cell ended.
        last_record_at: End of the last block, UTC; empty before the first.
        read_from: Where all this was read; the only thing that differs between two readings of one sweep.
        lanes_png: The picture of the lanes, when a trace was taken.
        layer, projections: A whole layer's time, when the user gave one, and what the savings are of it.
    """

    result: SweepResult
    spec: ExperimentSpec
    settlings: Sequence[dict[str, Any]]
    last_record_at: str
    read_from: str
    lanes_png: bytes | None = None
    layer: Layer | None = None
    projections: Sequence[ProjectedArm] = field(default=())


def dossier_of(records: Records, sweep_id: str, result: SweepResult, read_from: str, lanes_png: bytes | None) -> Dossier:
    """The dossier of a sweep that has been judged."""
    spans = records.cell_spans(sweep_id)
    return Dossier(
        result=result,
        spec=ExperimentSpec.model_validate(records.sweep(sweep_id)["spec"]),
        settlings=records.settlings(sweep_id),
        last_record_at=utc(max(end_s for _, end_s in spans.values())) if spans else "",
        read_from=read_from,
        lanes_png=lanes_png,
    )


def read_dossier(source: Source, layer: Layer | None = None, layer_cell: str | None = None) -> Dossier:
    """Judges an open sweep, whenever that is asked: also while it runs.

    Raises:
        UserError: It was measured under another methodology, or the layer fits no cell.
    """
    result = load_result(source.records, source.sweep_id)
    dossier = dossier_of(source.records, source.sweep_id, result, source.read_from, source.lanes_png)
    if layer is None:
        return dossier
    return replace(dossier, layer=layer, projections=project_sweep(result, layer, layer_cell))
