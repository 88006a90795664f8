"""Grids of synthetic steps."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from experiments.workload.grid import GridWorkload
from experiments.workload.step import Sequence, Step


def test_defaults_are_one_sequence_without_prefix() -> None:
    (point,) = GridWorkload(new_tokens=(4096,)).points()
    assert point.steps == (Step((Sequence(0, 4096),)),)
    assert point.label == "new4096"


def test_lengths_are_of_each_sequence() -> None:
    grid = GridWorkload.model_validate({"prefix_tokens": 8192, "new_tokens": 4096, "sequences": 2})
    (step,) = grid.points()[0].steps
    assert step.sequences == (Sequence(8192, 4096), Sequence(8192, 4096))
    assert step.new_tokens == 8192
    assert grid.points()[0].label == "new4096x2-prefix8192"


def test_points_come_in_the_order_written() -> None:
    grid = GridWorkload.model_validate({"prefix_tokens": [8, 0], "new_tokens": [64, 32], "sequences": [1, 2]})
    assert [point.label for point in grid.points()] == [
        *("new64-prefix8", "new64x2-prefix8", "new64", "new64x2"),
        *("new32-prefix8", "new32x2-prefix8", "new32", "new32x2"),
    ]


_axis = st.lists(st.integers(1, 1 << 20), min_size=1, max_size=4, unique=True)


@given(prefix=_axis, new=_axis, sequences=st.lists(st.integers(1, 8), min_size=1, max_size=3, unique=True))
def test_every_combination_comes_once_under_its_own_label(prefix: list[int], new: list[int], sequences: list[int]) -> None:
    points = GridWorkload.model_validate({"prefix_tokens": prefix, "new_tokens": new, "sequences": sequences}).points()
    assert {(p.prefix_tokens, p.new_tokens, p.sequences) for p in points} == {
        (p, n, s) for p in prefix for n in new for s in sequences
    }
    assert len({point.label for point in points}) == len(points) == len(prefix) * len(new) * len(sequences)


def test_a_grid_survives_its_own_json() -> None:
    grid = GridWorkload.model_validate({"new_tokens": [4096, 16384], "prefix_tokens": 512})
    assert GridWorkload.model_validate_json(grid.model_dump_json()) == grid


@pytest.mark.parametrize(
    ("content", "field", "message"),
    [
        ({}, "new_tokens", "required"),
        ({"new_tokens": []}, "new_tokens", "at least one value"),
        ({"new_tokens": 0}, "new_tokens", "greater than or equal to 1"),
        ({"new_tokens": [4096, -1]}, "new_tokens", "greater than or equal to 1"),
        ({"new_tokens": [4096, 64, 4096]}, "new_tokens", "twice: 4096, 64, 4096"),
        ({"new_tokens": True}, "new_tokens", "valid integer"),
        ({"new_tokens": 1.5}, "new_tokens", "valid integer"),
        ({"new_tokens": "4096"}, "new_tokens", "valid integer"),
        ({"new_tokens": None}, "new_tokens", "valid integer"),
        ({"new_tokens": 10**15}, "new_tokens", "less than or equal"),
        ({"new_tokens": 64, "prefix_tokens": -1}, "prefix_tokens", "greater than or equal to 0"),
        ({"new_tokens": 64, "sequences": 0}, "sequences", "greater than or equal to 1"),
        ({"new_tokens": 64, "sequences": 10**9}, "sequences", "less than or equal"),
        ({"new_tokens": 64, "new_token": 64}, "new_token", "not permitted"),
    ],
)
def test_what_cannot_be_run_is_refused(content: dict[str, Any], field: str, message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        GridWorkload.model_validate(content)
    (problem,) = caught.value.errors()
    assert problem["loc"][0] == field
    assert message in problem["msg"]
