"""Projection: the ratio's interval carried on to a layer and to the time to first token, never without a source."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from experiments.errors import UserError
from service.judge.interval import Interval
from service.judge.projection import Layer, layer_given, project, project_sweep
from tests.service.synthetic import home_in, make_spec, make_sweep

LAYER = Layer(layer_us=1000.0, source="a profile, H200, 2026-11", layers_in_model=61, ttft_ms=122.0)


def test_the_interval_is_carried_through() -> None:
    projection = project(Interval(0.9, 0.88, 0.93), 50.0, LAYER)
    assert projection.model_ms is not None
    assert projection.ttft_pct is not None
    for found, expected in (
        (projection.saved_us, (5.0, 3.5, 6.0)),
        (projection.layer_pct, (0.5, 0.35, 0.6)),
        (projection.model_ms, (0.305, 0.2135, 0.366)),
        (projection.ttft_pct, (0.25, 0.175, 0.3)),
    ):
        assert (found.estimate, found.low, found.high) == pytest.approx(expected)


def test_a_loss_is_a_loss() -> None:
    projection = project(Interval(1.1, 1.05, 1.2), 50.0, LAYER)
    assert projection.saved_us.high < 0
    assert projection.layer_pct.low == pytest.approx(-1.0)


@pytest.mark.parametrize(
    ("ratio", "is_small", "words"),
    [
        (Interval(0.9, 0.85, 0.95), True, "under 1 % of a layer (at most 0.75 %)"),
        (Interval(0.9, 0.5, 0.95), False, "up to 2.5 % of a layer"),
        (Interval(0.9, 0.0, math.inf), False, "not bounded by what was measured"),
    ],
)
def test_small_is_said_only_when_the_far_end_is_small(ratio: Interval, is_small: bool, words: str) -> None:
    projection = project(ratio, 50.0, LAYER)
    assert (projection.is_small, projection.words) == (is_small, words)


def test_without_ttft_there_is_no_share_of_it() -> None:
    projection = project(Interval(0.9, 0.8, 1.0), 50.0, Layer(1000.0, "a profile"))
    assert (projection.model_ms, projection.ttft_pct) == (None, None)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ((100.0, " ", None, None), "--layer-source"),
        ((0.0, "a profile", None, None), "--layer-us"),
        ((math.nan, "a profile", None, None), "--layer-us"),
        ((100.0, "a profile", None, 5.0), "--layers-in-model"),
        ((100.0, "a profile", 61, -5.0), "--ttft-ms"),
        ((100.0, "a profile", 0, None), "--layers-in-model"),
        ((None, "a profile", None, None), "--layer-us"),
        ((None, "", 61, None), "--layer-us"),
    ],
)
def test_what_a_projection_lacks_is_named(values: tuple[float | None, str, int | None, float | None], says: str) -> None:
    with pytest.raises(UserError, match=says):
        layer_given(*values)


def test_nothing_asked_is_nothing_projected() -> None:
    assert layer_given(None, "", None, None) is None


def test_a_projection_agrees_with_the_verdict(tmp_path: Path) -> None:
    """Told from nothing exactly when the verdict says so: both read one interval."""
    _, result = make_sweep(home_in(tmp_path), make_spec(2))
    for projected, cell in zip(project_sweep(result, LAYER), result.cells, strict=True):
        arm = cell.arms[1]
        baseline = cell.arms[0].latency
        assert arm.comparison is not None
        assert baseline is not None
        assert projected.is_told == projected.projection.saved_us.excludes(0)
        assert projected.projection.saved_us.estimate == pytest.approx(baseline.p50_us * (1 - arm.comparison.ratio.estimate))


def test_a_layer_fits_one_workload_only(tmp_path: Path) -> None:
    _, result = make_sweep(home_in(tmp_path), make_spec(4), invalid=[0])
    with pytest.raises(UserError, match=r"--layer-cell.*\(new64, cp_size 2\).*\(new128, cp_size 2\)"):
        project_sweep(result, LAYER)
    with pytest.raises(UserError, match="no cell 'nope'"):
        project_sweep(result, LAYER, "nope")
    both = project_sweep(result, LAYER, str(result.cells[2].cell["cell_id"]))
    assert [p.label for p in both] == [cell.label for cell in result.cells[2:]]
    valid = project_sweep(result, LAYER, str(result.cells[0].cell["cell_id"]))
    assert [p.label for p in valid] == [result.cells[1].label], "an INVALID cell is projected"
