"""What each MLflow run will say, worked out from the result alone, before MLflow is even imported.

A sweep is one summary run and flat runs, one for each (cell, arm) and one for each curve over lengths: nested ones are collapsed
in the dashboard and missing from its charts. Metric names are the same on every arm, so that charts and the compare page set arms
side by side without any set-up.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from experiments.names import Device, FabricKind, SweepStatus, Verdict
from experiments.spec.experiment import ExperimentSpec
from service.judge.interval import Interval
from service.judge.results import ArmResult, CellResult, SweepResult
from service.report.table import counted_words, verdict_words
from service.store.columns import COLOR_TAG, NIGHTS_SERIES, PLACE_TAG, SERIES_TAG, arm_columns, short_revision, summary_columns
from service.store.curves import Curve, curve_shape, curves_of
from service.store.note import note
from service.store.palette import arm_color

KEY_TAG = "cplab.key"
COMPLETE_TAG = "cplab.complete"
"""Set after everything else of a run is there; without it a run is what a crash left."""

BASELINE_VERDICT = "BASELINE"
"""The verdict tag of the arm that is compared with nothing."""

_COMMIT = re.compile("[0-9a-f]{40}")
_MAX_HOSTS = 64
_MAX_TAG_CHARS = 4000


@dataclass(frozen=True)
class PlannedRun:
    """One MLflow run. Times in milliseconds since the epoch, as measured.

    Attributes:
        key: Unique in the store: `sweep_id/cell_id/arm`, `sweep_id/curve/...`, or `sweep_id/summary`.
        role: arm, curve or summary.
        cell_id, arm: Whose samples belong to it; empty for the summary and for curves.
        status: FINISHED, FAILED or KILLED.
        series: Metrics with several values: (step, value), the step being new tokens.
    """

    key: str
    role: str
    cell_id: str
    arm: str
    name: str
    status: str
    start_ms: int
    end_ms: int
    tags: Mapping[str, str]
    params: Mapping[str, str]
    metrics: Mapping[str, float]
    series: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)


def plan_runs(
    row: Mapping[str, Any], spec: ExperimentSpec, result: SweepResult, spans: Mapping[str, tuple[float, float]]
) -> list[PlannedRun]:
    """Every run of a sweep; the summary last, so that it stands only where all others do.

    Args:
        row: The sweep's row of the records.
        spans: When each cell was measured, seconds since the epoch; the sweep's own span stands in for a cell without one.
    """
    whole = row["started_s"], row["ended_s"]
    arms = [
        _arm_run(row, spec, result, cell, arm, spans.get(cell.cell["cell_id"], whole))
        for cell in result.cells
        for arm in cell.arms
    ]
    curves = curves_of(result)
    curve_runs = [_curve_run(row, spec, result, number, len(curves), curve, whole) for number, curve in enumerate(curves)]
    return [*arms, *curve_runs, _summary_run(row, spec, result, whole)]


def _arm_run(
    row: Mapping[str, Any],
    spec: ExperimentSpec,
    result: SweepResult,
    cell: CellResult,
    arm: ArmResult,
    span: tuple[float, float],
) -> PlannedRun:
    cell_id = str(cell.cell["cell_id"])
    verdict = verdict_words(arm) or BASELINE_VERDICT
    key = f"{result.sweep_id}/{cell_id}/{arm.arm}"
    reason = {"verdict_reason": _cut(arm.reason)} if arm.reason else {}
    failure = {"failure": _cut(cell.failure)} if cell.failure else {}
    tags = {
        KEY_TAG: key,
        **_sweep_tags(row, spec, result),
        **_coordinates([cell]),
        "cell_id": cell_id,
        "arm": arm.arm,
        "role": "arm",
        "verdict": verdict,
        **arm_columns(result, cell, arm),
        "small": _flag(arm.is_small),
        "path": _cut(cell.path),
        **({"host_bound": _flag(arm.host_bound)} if arm.host_bound is not None else {}),
        **reason,
        **failure,
    }
    return PlannedRun(
        key=key,
        role="arm",
        cell_id=cell_id,
        arm=arm.arm,
        name=f"{arm.arm}-{cell.label}",
        status=_status(spec, result, cell, arm),
        start_ms=round(span[0] * 1000),
        end_ms=round(span[1] * 1000),
        tags=tags,
        params=_params(spec, cell, arm),
        # The compare page draws the first metric.
        metrics=_check_metrics(cell) if cell.is_invalid else {**_speed_metrics(cell, arm), **_check_metrics(cell)},
    )


def _summary_run(row: Mapping[str, Any], spec: ExperimentSpec, result: SweepResult, span: tuple[float, float]) -> PlannedRun:
    key = f"{result.sweep_id}/summary"
    verdicts = Counter(str(arm.verdict) for cell in result.cells for arm in cell.arms if arm.verdict is not None)
    words = counted_words(arm for cell in result.cells for arm in cell.arms) or "nothing compared"
    return PlannedRun(
        key=key,
        role="summary",
        cell_id="",
        arm="",
        name=f"{result.experiment}-{result.sweep_id}",
        status=result.status.value,
        start_ms=round(span[0] * 1000),
        end_ms=round(span[1] * 1000),
        tags={
            KEY_TAG: key,
            **_sweep_tags(row, spec, result),
            **_coordinates(result.cells),
            "cell_id": "all",
            "arm": "all",
            "role": "summary",
            "verdict": words,
            **summary_columns(result),
            **({SERIES_TAG: NIGHTS_SERIES} if result.environment.get("night") else {}),
            "mlflow.note.content": note(result),
            **({"failure": _cut(result.failure)} if result.failure else {}),
        },
        params={
            "experiment": result.experiment,
            "arms": ",".join(spec.arms),
            "num_cells": str(len(result.cells)),
            **_plan_params(spec),
            **{f"replay_{key}": _cut(str(value)) for key, value in (result.replay or {}).items()},
        },
        metrics=_finite(
            {
                "sweep/cells": len(result.cells),
                "sweep/invalid": sum(cell.is_invalid for cell in result.cells),
                "sweep/measured": sum(cell.is_measured for cell in result.cells),
                "sweep/wall_s": span[1] - span[0],
                "aa/flagged": len(result.aa.flagged),
                "aa/cells": result.aa.cells,
                "aa/min_p": result.aa.smallest_p,
                **{f"verdicts/{name.value.lower()}": verdicts[name] for name in Verdict},
            }
        ),
    )


def _curve_run(
    row: Mapping[str, Any],
    spec: ExperimentSpec,
    result: SweepResult,
    number: int,
    count: int,
    curve: Curve,
    span: tuple[float, float],
) -> PlannedRun:
    key = f"{result.sweep_id}/curve/{curve.arm}/{curve.label}"
    cells = [cell for cell, _ in curve.points.values()]
    shade = number / max(count - 1, 1)
    return PlannedRun(
        key=key,
        role="curve",
        cell_id="",
        arm="",
        name=f"{curve.arm} over lengths, {curve.label}",
        status=SweepStatus.FINISHED.value,
        start_ms=round(span[0] * 1000),
        end_ms=round(span[1] * 1000),
        tags={
            KEY_TAG: key,
            **_sweep_tags(row, spec, result),
            **_coordinates(cells),
            "cell_id": "curve",
            "arm": curve.arm,
            "role": "curve",
            "verdict": counted_words(arm for _, arm in curve.points.values()) or BASELINE_VERDICT,
            "shape": curve_shape(curve),
            PLACE_TAG: f"2.{number:04d}",
            COLOR_TAG: arm_color(curve.order, shade),
        },
        params={"arm": curve.arm, "curve": curve.label},
        metrics={},
        series=curve.values,
    )


def _status(spec: ExperimentSpec, result: SweepResult, cell: CellResult, arm: ArmResult) -> str:
    """FAILED for what is wrong; a cell cut short by the sweep's end ends as the sweep did."""
    if cell.is_invalid or cell.failure:
        return SweepStatus.FAILED.value
    if cell.launches < spec.measurement.launches and result.status is not SweepStatus.FINISHED:
        return result.status.value
    return SweepStatus.FINISHED.value if arm.num_samples else SweepStatus.FAILED.value


def _sweep_tags(row: Mapping[str, Any], spec: ExperimentSpec, result: SweepResult) -> dict[str, str]:
    env = result.environment
    hosts = sorted({str(rank.get("hostname", "?")) for launch in env.get("launches", []) for rank in launch["ranks"]})
    if len(hosts) > _MAX_HOSTS:
        hosts = [*hosts[:_MAX_HOSTS], f"and {len(hosts) - _MAX_HOSTS} more"]
    revision = str(env.get("revision", "unknown"))
    return {
        "sweep_id": result.sweep_id,
        "experiment": result.experiment,
        "suite": spec.suite,
        "spec_hash": result.spec_hash,
        "methodology_version": str(result.methodology_version),
        "revision": revision,
        "rev": short_revision(env),
        "dirty": _flag(env.get("dirty")),
        "source_digest": str(env.get("source_digest", "unknown")),
        "hosts": _cut(",".join(hosts)),
        # A night's own name where it has one: it may be started after midnight, or be the second of its date.
        "night": str(env.get("night") or datetime.fromtimestamp(row["started_s"], UTC).strftime("%Y-%m-%d")),
        # The table shows what stands after the last slash: not the whole command, which environment.json has.
        "mlflow.source.name": f"cplab run {result.experiment}",
        # MLflow shows it as a commit, which a source digest is not.
        **({"mlflow.source.git.commit": revision} if _COMMIT.fullmatch(revision) else {}),
    }


def _coordinates(cells: list[CellResult] | tuple[CellResult, ...]) -> dict[str, str]:
    """Tags that say what was varied; over several cells every value, and `mixed` where a flag is not one answer."""

    def values(name: str) -> str:
        return _cut(",".join(sorted({str(cell.cell[name]) for cell in cells})))

    def flag(flags: set[bool]) -> str:
        return "mixed" if len(flags) > 1 else _flag(next(iter(flags), False))

    return {
        "fabric": values("fabric_name"),
        "emulated": flag({cell.cell["fabric"]["kind"] == FabricKind.EMULATED for cell in cells}),
        "simulated": flag({cell.cell["device"] == Device.SIMULATED for cell in cells}),
        "beyond_upstream": flag({bool(cell.cell["beyond_upstream"]) for cell in cells}),
        "steps_without_cp": values("steps_without_cp"),
        "device": values("device"),
        "split": values("split"),
        "cp_size": values("cp_size"),
        "scope": values("scope"),
        "regime": values("regime"),
        "dims": values("dims_name"),
        **_unusual(cells),
    }


def _unusual(cells: Sequence[CellResult]) -> dict[str, str]:
    """Coordinates that most sweeps leave at rest, where one of the cells does not."""
    found = {name: sorted({float(cell.cell.get(name, 0)) for cell in cells}) for name in ("skew_us", "filler_us")}
    return {name: _cut(",".join(f"{value:g}" for value in values)) for name, values in found.items() if any(values)}


def _params(spec: ExperimentSpec, cell: CellResult, arm: ArmResult) -> dict[str, str]:
    names = ("workload", "num_steps", "new_tokens", "prefix_tokens", "cp_size", "split", "scope", "regime", "device")
    coordinates = {name: _cut(str(cell.cell[name])) for name in names} | _unusual([cell])
    fabric, dims = cell.cell["fabric_name"], cell.cell["dims_name"]
    return {"arm": arm.arm, **arm.factors, **coordinates, "fabric": fabric, "dims": dims, **_plan_params(spec)}


def _plan_params(spec: ExperimentSpec) -> dict[str, str]:
    return {"seed": str(spec.seed), **{key: str(value) for key, value in spec.measurement.model_dump(mode="json").items()}}


def _check_metrics(cell: CellResult) -> dict[str, float]:
    return _finite(
        {
            "check/recall": cell.checks.get("recall_r2"),
            "check/recall_r1": cell.checks.get("recall_r1"),
            "check/count": cell.checks.get("num_checks"),
            "check/faults": len(cell.faults),
            "check/unsettled": cell.checks.get("unsettled_launches"),
        }
    )


def _speed_metrics(cell: CellResult, arm: ArmResult) -> dict[str, float]:
    """Every figure under a name that fits a chart's title: `section/short_unit`.

    The baseline has no `ratio` section: a ratio to itself was not measured, and a bar at 1 would look as if it had been.
    """
    values: dict[str, float | None] = {
        "speed/tok_s": arm.tokens_per_s,
        "gather/p50_us": arm.gather_p50_us,
        "gather/late_us": cell.gather_late_p50_us,
        "gather/floor_us": cell.gather_floor_us,
        "gather/skew_us": cell.skew_p50_us,
        "gather/latest_us": max(cell.lateness_us, default=None),
        "filler/p50_us": cell.filler_p50_us,
        "samples/count": arm.num_samples,
        "samples/launches": cell.launches,
    }
    if cell.aa is not None:
        values |= {"aa/time": cell.aa.ratio.estimate, "aa/low": cell.aa.ratio.low, "aa/high": cell.aa.ratio.high}
    if arm.latency is not None:
        values |= {
            "latency/p50_us": arm.latency.p50_us,
            "latency/p90_us": arm.latency.p90_us,
            "latency/max_us": arm.latency.max_us,
            "latency/min_p50_us": arm.latency.fastest_rank_p50_us,
        }
    if arm.comparison is not None:
        ratio, fastest = arm.comparison.ratio, arm.comparison.ratio_min
        values |= {
            "ratio/time": ratio.estimate,
            "ratio/low": ratio.low,
            "ratio/high": ratio.high,
            "ratio/min_time": fastest.estimate,
            "ratio/min_low": fastest.low,
            "ratio/min_high": fastest.high,
            "ratio/p_value": arm.comparison.p_value,
            "ratio/detect_pct": arm.comparison.detectable_pct,
            "samples/pairs": arm.comparison.pairs,
        }
    return _finite(values | _account_metrics(arm))


def _account_metrics(arm: ArmResult) -> dict[str, float | None]:
    a = arm.account
    if a is None:
        return {}
    return {
        "account/total_us": a.total_us.estimate,
        "account/compute_us": a.compute_us.estimate,
        "account/exposed_us": a.exposed_us.estimate,
        "account/gather_us": a.gather_us.estimate,
        "account/window_us": a.window_us.estimate,
        "account/ideal_us": a.ideal_us.estimate,
        "account/tax_us": a.fork_join_tax_us.estimate,
        "account/contend_us": a.contention_us.estimate,
        "account/saved_us": a.saved_us.estimate,
        "account/saved_low": a.saved_us.low,
        "account/saved_high": a.saved_us.high,
        **_percent("hidden", a.hidden),
        **_percent("ideal", a.hidden_ideal),
    }


def _percent(name: str, share: Interval | None) -> dict[str, float | None]:
    if share is None:
        return {}
    return {
        f"account/{name}_pct": 100 * share.estimate,
        f"account/{name}_low": 100 * share.low,
        f"account/{name}_high": 100 * share.high,
    }


def _finite(values: Mapping[str, float | None]) -> dict[str, float]:
    """What can be drawn: MLflow turns an infinite bound into 1.8e308, which no chart survives."""
    return {name: float(value) for name, value in values.items() if value is not None and math.isfinite(value)}


def _flag(value: bool | None) -> str:
    return "unknown" if value is None else str(value).lower()


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_TAG_CHARS else f"{text[: _MAX_TAG_CHARS - 4]} ..."
