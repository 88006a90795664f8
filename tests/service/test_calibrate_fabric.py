"""A link model from gathers: planted links are recovered, nccl-tests' JSON is read, and what is written can be run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from experiments import catalogue
from experiments.errors import UserError
from experiments.names import Device, FabricKind
from service.calibrate.commands import app
from service.calibrate.fabric import GatherPoint, LinkModel, fit, points_of_nccl_tests, preset


@given(
    latency_us=st.floats(0, 5e3),
    gbps=st.floats(0.001, 1000),
    sizes=st.lists(st.integers(1 << 12, 1 << 28), min_size=2, max_size=6, unique=True),
)
def test_a_planted_link_is_recovered(latency_us, gbps, sizes):
    points = [GatherPoint(size, latency_us + size / gbps / 1e3) for size in sizes]
    model = fit(points)
    assert model.misfit < 1e-6
    for size in sizes:
        assert model.latency_us + size * 8 / model.bandwidth_mbps == pytest.approx(latency_us + size / gbps / 1e3, rel=1e-6)


def test_small_gathers_count_as_much_as_large_ones():
    """Ten per cent off on one point moves the model by no more than that anywhere."""
    sizes = [1 << n for n in range(16, 25)]
    points = [GatherPoint(size, (30 + size / 50e3) * (1.1 if size == 1 << 24 else 1)) for size in sizes]
    assert fit(points).latency_us == pytest.approx(30, rel=0.1)


@pytest.mark.parametrize(
    ("points", "says"),
    [([GatherPoint(100, 5.0)], "at least 2 sizes"), ([GatherPoint(100, 5.0), GatherPoint(10_000, 1.0)], "larger --tokens")],
)
def test_what_tells_no_link_is_refused(points, says):
    with pytest.raises(UserError, match=says):
        fit(points)


def nccl_tests(path: Path, ranks: int = 8) -> Path:
    results = [
        {"size": size, "out_of_place": {"time": 20 + size / 450e3}, "in_place": {"time": 15 + size / 450e3}}
        for size in (0, 1 << 20, 1 << 24)
    ]
    results[1]["out_of_place"] = None
    path.write_text(json.dumps({"config": {"devices": [{"rank": r} for r in range(ranks)]}, "results": results}))
    return path


def test_nccl_tests_own_file_is_read(tmp_path):
    points = points_of_nccl_tests(nccl_tests(tmp_path / "gather.json"))
    assert points == [
        GatherPoint((1 << 20) * 7 // 8, 15 + (1 << 20) / 450e3),
        GatherPoint((1 << 24) * 7 // 8, 15 + (1 << 24) / 450e3),
    ]


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"results": []}', '{"config": {"devices": []}, "results": [{"size": 8, "in_place": {"time": 3}}]}'],
)
def test_another_file_is_refused_by_name(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=r"x\.json: not the JSON of nccl-tests"):
        points_of_nccl_tests(tmp_path / "x.json")


def test_a_preset_is_a_fabric_that_specs_take(tmp_path):
    text = preset(LinkModel(14.5, 3.2e6, 0.03), "our_nvlink", Device.CUDA, 8, ["said: so"])
    first, last = catalogue.load("one_gpu", [f"cells.fabric={text}"]).cells.fabric
    assert (first.name, last.name) == ("one_rank_our_nvlink_first", "one_rank_our_nvlink_last")
    assert (first.bandwidth_mbps, first.latency_us, first.ctas) == (3.2e6, 14.5, 8)


def test_gathers_here_become_a_link(tmp_path):
    out = tmp_path / "link.yaml"
    words = ["fabric", "--out", str(out), "--plain", "--tokens", "128,65536", "--trials", "6", "--skew-us", "2000"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    lines = out.read_text().splitlines()
    assert len([line for line in lines if "bytes:" in line]) == 4
    (fabric,) = catalogue.load("quickstart", [f"cells.fabric={out.read_text()}"]).cells.fabric
    assert fabric.kind is FabricKind.EMULATED


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--tokens", "many"], "--tokens 'many'"),
        (["--tokens", "1,512"], "at least"),
        (["--device", "simulated"], "gathers nothing"),
        (["--nccl-tests", "no_such_file.json"], "no_such_file.json"),
    ],
)
def test_mistakes_are_one_line(tmp_path, words, says):
    done = CliRunner().invoke(app, ["fabric", "--out", str(tmp_path / "x.yaml"), "--plain", *words])
    assert done.exit_code == 2
    assert says in done.output
    assert not (tmp_path / "x.yaml").exists()
