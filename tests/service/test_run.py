"""The whole line with real parts: Ray, gloo ranks, SQLite, MLflow. One small spec, run the ways that users run it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from experiments import catalogue
from tests.service.test_cli import cplab

SMALL = [
    *("--set", "workload.new_tokens=256", "--set", "cells.split=zigzag", "--set", "cells.fabric=emulated_20mbit"),
    *("--set", "measurement.launches=5", "--set", "measurement.blocks=1", "--set", "measurement.trials_per_block=2"),
    *("--set", "measurement.control_trials=2", "--set", "measurement.warmup_trials=1"),
]

CLEAR = [
    *SMALL,
    *("--set", "measurement.launches=6", "--set", "measurement.max_launches=20", "--set", "measurement.trials_per_block=4"),
]
"""An effect of a quarter is told from 1, after as many launches as that takes on a busy machine."""


def arms_of(path: Path) -> dict[str, dict]:
    result = json.loads(path.read_text())
    return {arm["arm"]: arm for cell in result["cells"] for arm in cell["arms"]}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    done = cplab("run", "quickstart", *CLEAR, "--json", str(home / "out.json"), home=home)
    return home, done


def test_a_run_ends_with_verdicts_records_and_runs_in_mlflow(finished):
    home, done = finished
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Ray: a local cluster of this run's own")
    assert "overlapped" in done.stdout
    assert "measured on:" in done.stdout
    assert "emulated links" in done.stdout
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{home}/mlflow.db")
    experiment = client.get_experiment_by_name("nsa-indexer")
    assert str(home) in experiment.artifact_location
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == 3
    assert {r.info.status for r in runs} == {"FINISHED"}
    names = [set(r.data.metrics) for r in runs if r.data.tags["role"] == "arm"]
    assert {"speed/tok_s", "latency/p50_us"} <= names[0] & names[1]


def test_an_emulated_link_shows_the_overlap(finished):
    home, _ = finished
    overlapped = arms_of(home / "out.json")["overlapped"]
    assert overlapped["verdict"] == "FASTER"
    assert overlapped["comparison"]["ratio"]["high"] < 1
    assert overlapped["account"]["saved_us"]["estimate"] > 0


def test_the_json_is_what_the_readme_says(finished):
    home, _ = finished
    result = json.loads((home / "out.json").read_text())
    assert result["schema"] == 2
    assert {"sweep_id", "experiment", "status", "spec_hash", "environment", "cells", "methodology_version"} <= set(result)
    cell = result["cells"][0]
    assert {"cell_id", "label", "split", "cp_size", "fabric_name", "valid", "faults", "checks", "path", "arms"} <= set(cell)
    assert cell["valid"]
    assert cell["checks"]["recall_r2"] >= 0.99
    assert result["environment"]["revision"]
    launch = result["environment"]["launches"][0]
    assert [rank["rank"] for rank in launch["ranks"]] == [0, 1]


def test_swapped_arms_swap_the_verdicts(tmp_path):
    swap = ["--set", "arms.baseline.schedule=overlap_rotate", "--set", "arms.overlapped.schedule=serial"]
    done = cplab("run", "quickstart", *CLEAR, *swap, "--json", str(tmp_path / "out.json"), home=tmp_path)
    assert done.returncode == 0, done.stderr
    arms = arms_of(tmp_path / "out.json")
    assert arms["overlapped"]["verdict"] == "SLOWER"
    assert arms["baseline"]["account"]["saved_us"]["estimate"] > 0


def test_a_trace_is_replayed(tmp_path):
    trace = tmp_path / "trace.jsonl"
    lines = [
        {"timestamp": i, "input_length": 300 + 400 * i, "output_length": 9, "hash_ids": list(range(1 + (299 + 400 * i) // 512))}
        for i in range(6)
    ]
    trace.write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = cplab(
        *(
            "run",
            "mooncake",
            "--set",
            f"workload.trace={trace}",
            "--set",
            "measurement.launches=5",
            "--set",
            "workload.max_prompt_tokens=256",
        ),
        *("--json", str(tmp_path / "out.json")),
        home=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["replay"]["num_requests"] == 6
    assert result["replay"]["scale"] == pytest.approx(256 / 2300)
    assert result["cells"][0]["num_steps"] >= 6
    assert all(arm["tokens_per_s"] > 0 for arm in result["cells"][0]["arms"])
    assert "scaled by" in done.stdout


def test_a_simulated_device_says_so_and_its_truth_comes_out(tmp_path):
    done = cplab(
        *(
            "run",
            "quickstart",
            *SMALL,
            "--set",
            "device=simulated",
            "--set",
            "simulation.gather_us=30",
            "--set",
            "simulation.main_slowdown=0",
        ),
        *("--json", str(tmp_path / "out.json")),
        home=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "simulated-" in done.stdout
    assert "nothing was measured" in done.stdout
    account = arms_of(tmp_path / "out.json")["overlapped"]["account"]
    assert account["gather_us"]["estimate"] == pytest.approx(30)
    assert account["window_us"]["estimate"] == pytest.approx(14)
    assert account["contention_us"]["estimate"] == pytest.approx(0, abs=1e-6)
    assert account["fork_join_tax_us"]["estimate"] == pytest.approx(2)


def test_a_spec_of_ones_own_runs_from_its_file(tmp_path):
    content = yaml.safe_load((catalogue.FOLDER / "quickstart.yaml").read_text())
    content["name"] = "mine"
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(content))
    done = cplab("run", str(path), "--plan", home=tmp_path)
    assert done.returncode == 0
    assert done.stdout.startswith("mine: 4 cells")


def test_the_ratios_can_be_drawn(finished, tmp_path):
    from service.report.forest import draw_forest
    from service.store.judged import load_result
    from service.store.records import Records

    home, _ = finished
    records = Records(home / "records.db")
    result = load_result(records, json.loads((home / "out.json").read_text())["sweep_id"])
    records.close()
    draw_forest(result, tmp_path / "ratios.png")
    assert (tmp_path / "ratios.png").read_bytes()[:4] == b"\x89PNG"


def test_a_traced_run_keeps_its_files_and_attaches_them_to_its_runs(tmp_path):
    done = cplab("run", "quickstart", *SMALL, "--lanes", str(tmp_path / "lanes.png"), home=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"traces:  {tmp_path}/traces/" in done.stdout
    kept = {path.name: path.read_bytes() for path in (tmp_path / "traces").rglob("*.*")}
    assert set(kept) == {"trace.json", "lanes.png"}
    events = json.loads(kept["trace.json"])["traceEvents"]
    assert {(e["pid"], e["args"]["arm"]) for e in events if e["ph"] == "X"} == {
        (process, arm) for process in (100, 200) for arm in ("baseline", "overlapped")
    }
    assert kept["lanes.png"][:4] == (tmp_path / "lanes.png").read_bytes()[:4] == b"\x89PNG"
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("nsa-indexer").experiment_id], "tags.role = 'arm'")
    assert len(runs) == 2
    for run in runs:
        for name, content in kept.items():
            (attached,) = (tmp_path / "artifacts").rglob(f"{run.info.run_id}/artifacts/{name}")
            assert attached.read_bytes() == content
