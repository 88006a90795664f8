"""The status in Prometheus' text format (exposition format 0.0.4), for a node exporter's textfile collector or a scrape by cron."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_GAUGES = {
    "sweep_visits_done": "Cells in a launch that are complete, of a sweep that the records call RUNNING.",
    "sweep_visits_planned": "Cells in a launch that are planned, at the most.",
    "sweep_cells": "Cells of the sweep.",
    "sweep_cells_invalid": "Cells that are INVALID.",
    "sweep_cells_given_up": "Cells that were given up.",
    "sweep_failed_attempts": "Groups that the sweep has lost.",
    "sweep_has_driver": "1 while the driver lives; 0 when only `cplab run --resume` goes on with it.",
    "sweep_idle_seconds": "Since the last block.",
    "rank_up": "A rank of the last launch, and where it runs.",
    "cell_seconds": "Spent on a cell so far.",
    "cell_gpu_seconds": "The same, times the GPUs that its ranks hold.",
    "lease_held": "1 where a sweep of this home holds a shared cluster.",
    "last_failure_timestamp_seconds": "When the latest attempt failed.",
    "sweeps": "Sweeps in the records, by status.",
}


def prometheus_text(values: Mapping[str, Any]) -> str:
    """Of what `service.status.status_values` gives. Gauges all: a resumed sweep may count anew, and the records are the memory."""
    found: dict[str, list[str]] = {}
    for name, labels, value in _samples(values):
        words = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
        found.setdefault(name, []).append(f"cplab_{name}{{{words}}} {value:.10g}" if words else f"cplab_{name} {value:.10g}")
    lines = []
    for name, about in _GAUGES.items():
        if name in found:
            lines += [f"# HELP cplab_{name} {about}", f"# TYPE cplab_{name} gauge", *found[name]]
    return "\n".join(lines) + "\n"


def _samples(values: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, object], float]]:
    for status, number in values["sweeps"].items():
        yield "sweeps", {"status": status}, number
    for sweep in values["running"]:
        labels = {"sweep_id": sweep["sweep_id"], "experiment": sweep["experiment"]}
        for name in ("visits_done", "visits_planned", "cells", "failed_attempts"):
            yield f"sweep_{name}", labels, sweep[name]
        yield "sweep_cells_invalid", labels, sweep["invalid"]
        yield "sweep_cells_given_up", labels, sweep["given_up"]
        yield "sweep_has_driver", labels, int(sweep["driver"] is not None)
        if sweep["idle_s"] is not None:
            yield "sweep_idle_seconds", labels, sweep["idle_s"]
        for rank in sweep["ranks"]:
            where = {"rank": rank["rank"], "host": rank["hostname"], "address": rank["address"], "gpu": rank["gpu"]}
            yield "rank_up", {**labels, **where}, 1
        for cell in sweep["spent"]:
            of_cell = {**labels, "cell_id": cell["cell_id"], "cell": cell["label"]}
            yield "cell_seconds", of_cell, cell["seconds"]
            yield "cell_gpu_seconds", of_cell, cell["gpu_seconds"]
    if lease := values["lease"]:
        yield "lease_held", {"cluster": lease["cluster"], "sweep_id": lease["sweep_id"], "host": lease.get("host", "")}, 1
    if values["last_failures"]:
        yield "last_failure_timestamp_seconds", {}, values["last_failures"][0]["failed_s"]


def _escaped(text: object) -> str:
    return str(text).replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
