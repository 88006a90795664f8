"""Report, compare and reproduce on a sweep that really ran, with MLflow on SQLite."""

from __future__ import annotations

import json
import re
import shutil

import pytest

from service.errors import ExitCode
from tests.service.test_cli import cplab, refused
from tests.service.test_report import Page
from tests.service.test_run import SMALL


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A home with one sweep, and what it said."""
    home = tmp_path_factory.mktemp("home")
    done = cplab(
        "run", "quickstart", *SMALL, "--set", "workload.new_tokens=[128,256]", "--json", str(home / "out.json"), home=home
    )
    assert done.returncode == 0, done.stderr
    return home, json.loads((home / "out.json").read_text())


def without_place(text: str) -> str:
    return re.sub(r"Read from .*?\. Every", "Read from. Every", text)


def test_the_page_is_the_same_from_records_and_from_mlflow(ran, tmp_path):
    home, result = ran
    pages = {}
    for name, options in (("records", []), ("mlflow", ["--from-mlflow"])):
        out = tmp_path / f"{name}.html"
        done = cplab("report", "last", "--out", str(out), *options, home=home)
        assert done.returncode == 0, done.stderr
        assert str(out) in done.stdout
        pages[name] = out.read_text()
    Page(pages["records"])
    assert result["sweep_id"] in pages["records"]
    assert pages["records"] != pages["mlflow"]
    assert without_place(pages["records"]) == without_place(pages["mlflow"])
    (attached,) = (home / "artifacts").rglob("report.html")
    assert attached.read_text() == pages["records"]
    assert f"{result['cells'][0]['arms'][1]['comparison']['ratio']['estimate']:.3f}" in pages["records"]


def test_people_who_sit_elsewhere_have_the_page_too(ran, tmp_path):
    home, result = ran
    uri = f"sqlite:///{home}/mlflow.db"
    done = cplab(
        "report", result["sweep_id"][:-2], "--out", str(tmp_path / "r.html"), home=tmp_path / "none", MLFLOW_TRACKING_URI=uri
    )
    assert done.returncode == 0, done.stderr
    assert "from MLflow at" in done.stdout
    Page((tmp_path / "r.html").read_text())


def test_a_projection_is_on_the_page_and_in_the_json(ran, tmp_path):
    home, result = ran
    cell = result["cells"][0]
    layer = ["--layer-us", "5e6", "--layer-source", "a planted layer", "--layer-cell", cell["cell_id"]]
    more = ["--layers-in-model", "61", "--ttft-ms", "4e5"]
    out, values = tmp_path / "r.html", tmp_path / "r.json"
    done = cplab("report", "last", "--out", str(out), "--json", str(values), *layer, *more, home=home)
    assert done.returncode == 0, done.stderr
    assert "a planted layer" in out.read_text()
    (projected,) = json.loads(values.read_text())["projection"]["arms"]
    ratio, baseline = cell["arms"][1]["comparison"]["ratio"], cell["arms"][0]["latency"]["p50_us"]
    assert projected["projection"]["layer_pct"]["low"] == pytest.approx(100 * (1 - ratio["high"]) * baseline / 5e6)
    refused(cplab("report", "last", "--layer-us", "5", home=home), "--layer-source")
    refused(cplab("report", "nope", home=home), "'nope'", result["sweep_id"])
    refused(cplab("report", "last", "--out", "/no/such/folder/x.html", home=home), "--out", "no folder")


def test_one_cell_is_reproduced_and_set_beside_the_first(ran, tmp_path):
    home, result = ran
    shutil.copytree(home, tmp_path / "home")
    cell_id = result["cells"][1]["cell_id"]
    home = tmp_path / "home"
    done = cplab("reproduce", result["sweep_id"], "--cell", cell_id, "--json", str(tmp_path / "again.json"), home=home)
    assert done.returncode == 0, done.stderr
    drifted = [line for line in done.stdout.splitlines() if "not as it was" in line and "uncommitted" not in line]
    assert not drifted, "the same code on the same machine"
    again = json.loads((tmp_path / "again.json").read_text())
    assert [cell["cell_id"] for cell in again["cells"]] == [cell_id]
    assert again["environment"]["reproduces"] == result["sweep_id"]
    assert f"cplab compare {result['sweep_id']} last" in done.stdout
    compared = cplab("compare", result["sweep_id"], "last", "--json", str(tmp_path / "changes.json"), home=home)
    assert compared.returncode in (ExitCode.FINE, ExitCode.REGRESSION), compared.stderr
    changes = json.loads((tmp_path / "changes.json").read_text())
    assert [row["cell_id"] for row in changes["rows"]] == [cell_id]
    assert changes["rows"][0]["change"]["ratio"]["low"] > 0
    assert changes["only_before"] == [f"cell {result['cells'][0]['label']}"]
    assert compared.returncode == (ExitCode.REGRESSION if changes["rows"][0]["verdict"] == "SLOWER" else ExitCode.FINE)


def test_a_cell_that_is_not_there_starts_nothing(ran):
    home, result = ran
    refused(cplab("reproduce", "last", "--cell", "nope", home=home), "--cell", result["cells"][0]["cell_id"])
