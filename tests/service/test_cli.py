"""The command line: quick answers, one-line errors, exit codes. Each mistake is tried in a process of its own, as a user would."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from service.errors import ExitCode

ROOT = Path(__file__).resolve().parents[2]


def cplab(*arguments: str, home: Path | str, timeout: float = 120, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")}
    env |= {"CPLAB_HOME": str(home), "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        [sys.executable, "-m", "service", *arguments],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def refused(done: subprocess.CompletedProcess[str], *says: str) -> None:
    """Exit 2, one line on stderr that says all this, no traceback, nothing on stdout: not even a cluster was started."""
    assert done.returncode == ExitCode.USER_ERROR, done
    assert "Traceback" not in done.stderr + done.stdout
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    for words in says:
        assert words in lines[0]
    assert done.stdout == ""


def test_help_and_list_answer_at_once(tmp_path):
    for arguments in (["--help"], ["list"]):
        best = min(_timed(lambda a=arguments: cplab(*a, home=tmp_path)) for _ in range(3))
        assert best < 3, f"{arguments} took {best:.1f} s"
    assert "quickstart" in cplab("list", home=tmp_path).stdout


def test_a_reader_that_has_seen_enough_gets_no_traceback(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "service", "list"],
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "CPLAB_HOME": str(tmp_path), "PYTHONUNBUFFERED": "1"},
            timeout=60,
            check=False,
        )
    finally:
        os.close(writer)
    assert done.returncode == ExitCode.INFRASTRUCTURE
    assert done.stderr == "cplab: failed: nobody reads its output any more\n"


def _timed(call) -> float:
    began = time.monotonic()
    assert call().returncode == 0
    return time.monotonic() - began


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["quickstart", "--lanes", "nowhere/lanes.png"], ["--lanes", "no folder"]),
        (["quickstart", "--lanes", "lanes.jpeg2000"], ["--lanes", "'lanes.jpeg2000'", ".png, .svg, .pdf"]),
        (["quickstart", "--picture", "ratios"], ["--picture", "'ratios'", ".png"]),
        (["quickstrat"], ["'quickstrat'", "did you mean 'quickstart'"]),
        (["quickstart", "--set", "measurement.launchs=3"], ["measurement.launchs", "did you mean 'launches'"]),
        (["quickstart", "--set", "arms.overlapped.schedule=overlap"], ["arms.overlapped.schedule", "overlap_rotate"]),
        (["quickstart", "--set", "cells.split=zig"], ["cells.split", "'zigzag' or 'interleave'"]),
        (["quickstart", "--set", "dims=v32"], ["dims", "deepseek_v32"]),
        (["quickstart", "--set", "measurement.launches=5s"], ["measurement.launches", "'5s'"]),
        (["quickstart", "--set", "workload.new_tokens=3"], ["workload.new_tokens", "cp_size"]),
        (["quickstart", "--set", "arms.overlapped.schedule=no.such:thing"], ["cannot import 'no.such'", "working directory"]),
        (["quickstart", "--set", "arms.overlapped.schedule=json:nothing"], ["has no function 'nothing'"]),
        (["mooncake"], ["workload.trace"]),
        (["mooncake", "--set", "workload.trace=/no/such/trace.jsonl"], ["workload.trace", "/no/such/trace.jsonl"]),
        (["quickstart", "--set", "weights.checkpoint=/no/such/folder"], ["weights.checkpoint", "no folder"]),
        (["quickstart", "--json", "/no/such/folder/x.json"], ["--json", "no folder"]),
        (["quickstart", "--json", "/proc/x.json"], ["--json", "'/proc/x.json' cannot be written"]),
        (["quickstart", "--json", "/tmp"], ["--json", "is a folder"]),
        (["quickstart.yaml"], ["'quickstart.yaml'", "did you mean 'quickstart'"]),
        (["quickstart", "--set", "shedule=serial"], ["unknown key 'shedule'", "allowed: about, arms"]),
        (["quickstart", "--set", "arms.overlapped=overlap_rotate"], ["arms.overlapped", "takes keys of its own", "schedule"]),
        (["quickstart", "--set", "arms={only: {schedule: serial}}"], ["arms", "'baseline'", "found: only"]),
        (["quickstart", "--set", "cells.cp_size=2,4"], ["cells.cp_size", "write a list as [2,4]"]),
        (["quickstart", "--set", "cells.fabric={kind: emulated, bandwidth_gbps: 3}"], ["did you mean 'bandwidth_mbps'"]),
        (["quickstart", "--set", "name=My Run"], ["name", "as in my-run", "'My Run'"]),
        (["quickstart", "--set", "simulation.gather_us=30"], ["simulation", "device=simulated"]),
        (["quickstart", "--set", "measurement.confidence=95"], ["measurement.confidence", "less than 1", "95"]),
        (["quickstart", "--set", "weights.layer=3"], ["weights", "checkpoint"]),
        (["quickstart", "--set", "arms.mine.schedule=tests.service.scripts:ends"], ["cannot import", "SystemExit"]),
        (["quickstart", "--set", "arms.mine.schedule=json:load"], ["'load' takes (fp,", "takes (ix, shard, fabric)"]),
        (["quickstart", "--set", "arms.mine.schedule=json.py:load"], ["without .py"]),
        (["quickstart", "--set", "workload.new_tokens=4K"], ["workload.new_tokens", "'4K'"]),
        (["quickstart", "--set", "workload.new_tokens=1000000000"], ["workload", "2 ranks x", "GiB of this machine"]),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_2(tmp_path, arguments, says):
    refused(cplab("run", *arguments, home=tmp_path), *says)


def test_a_malformed_line_of_a_trace_is_named(tmp_path):
    trace = tmp_path / "t.jsonl"
    good = '{"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [1, 2]}\n'
    trace.write_text(good + "{oops\n")
    refused(cplab("run", "mooncake", "--set", f"workload.trace={trace}", home=tmp_path), "t.jsonl:2", "workload.trace")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"timestamp": 1, "output_length": 5, "hash_ids": [1]}', "input_length is missing"),
        ('{"timestamp": 1, "input_length": -5, "output_length": 5, "hash_ids": [1]}', "not -5"),
        ("[1, 2]", "t.jsonl:3"),
    ],
)
def test_a_line_that_says_something_else_is_named_too(tmp_path, line, says):
    trace = tmp_path / "t.jsonl"
    good = '{"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [1, 2]}'
    trace.write_text(f"{good}\n{good}\n{line}\n")
    refused(cplab("run", "mooncake", "--set", f"workload.trace={trace}", home=tmp_path), "t.jsonl:3", says)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", ["is empty"]),
        ("- name", ["not list"]),
        ("name: a\nname: b\n", ["line 2, column 1", "'name' is there twice"]),
        ("name: [a", ["not YAML: line 1"]),
        ("name:\ta\n\tb: 1\n", ["not YAML"]),
        ("!!python/object/apply:os.system [id]", ["not YAML", "os.system"]),
    ],
)
def test_a_file_that_is_no_experiment_is_refused(tmp_path, content, says):
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    refused(cplab("run", str(path), home=tmp_path), "mine.yaml", *says)


def test_an_unwritable_home_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    refused(cplab("run", "quickstart", home=tmp_path / "file" / "home"), "CPLAB_HOME", "cannot be written")


def test_an_unreachable_cluster_is_refused(tmp_path):
    refused(cplab("run", "quickstart", home=tmp_path, RAY_ADDRESS="127.0.0.1:1"), "RAY_ADDRESS", "127.0.0.1:1")
    refused(cplab("run", "quickstart", home=tmp_path, RAY_ADDRESS="head"), "RAY_ADDRESS", "'head'", "host:port")


def test_ranks_that_do_not_fit_are_refused_with_what_there_is(tmp_path):
    done = cplab("run", "quickstart", "--set", "cells.cp_size=64", "--set", "workload.new_tokens=512", home=tmp_path)
    refused(done, "cells.cp_size", "64 ranks", f"the cluster has {os.cpu_count()}")


def test_a_plan_starts_nothing(tmp_path):
    done = cplab("run", "overlap_vs_baseline", "--plan", home=tmp_path / "never")
    assert done.returncode == 0
    assert done.stdout.count("ranks,") == 48
    assert "MiB a rank" in done.stdout
    assert not (tmp_path / "never").exists()


def test_the_doctor_finds_what_would_stop_a_run(tmp_path):
    well = cplab("doctor", home=tmp_path)
    assert well.returncode == 0
    for subject in ("versions", "devices", "cluster", "store", "neighbours"):
        assert subject in well.stdout
    ill = cplab("doctor", home=tmp_path, RAY_ADDRESS="127.0.0.1:1")
    assert ill.returncode == ExitCode.USER_ERROR
    assert "stop" in ill.stdout


def test_nothing_to_sync_is_fine(tmp_path):
    done = cplab("sync", home=tmp_path)
    assert done.returncode == 0
    assert "nothing to publish" in done.stdout
