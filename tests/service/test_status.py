"""What runs where, how far it is, what it cost and what failed last: as values, as lines, and for Prometheus."""

from __future__ import annotations

import re

import pytest

from experiments.names import SweepStatus
from service.prometheus import prometheus_text
from service.run.policy import Attempt, Decision
from service.run.tasks import Action, plan_tasks
from service.status import status_lines, status_values
from service.store.claim import claimed
from service.store.records import Records
from tests.service.test_cli import cplab, refused
from tests.service.test_records import reports
from tests.service.test_resume import small

SAMPLE = re.compile(r'^(?P<name>cplab_[a-z_]+)(\{(?P<labels>([a-z_]+="([^"\\\n]|\\.)*",?)*)\})? (?P<value>-?[0-9.e+]+)$')
CLUSTER = {"cluster": {"is_own": False, "address": "10.0.0.1:6379"}}


@pytest.fixture
def running(tmp_path):
    """Records of a sweep on a shared cluster, two ranks on two GPUs of two hosts, with a lost rank behind it."""
    records, spec = Records(tmp_path / "records.db"), small()
    cells = spec.expand().cells
    records.start_sweep("s", spec, cells, CLUSTER, None)
    ranks = [
        {"rank": r, "hostname": f'h"{r}"', "address": f"10.0.0.{r}", "gpu": "H100", "gpu_uuid": f"u{r}", "rank_pid": 7}
        for r in range(2)
    ]
    records.add_launch("s", 2, 0, ranks, 0.5)
    records.add_block("s", cells[0].cell_id, 0, "arms", 0, reports(), 2e3)
    for _ in range(2):  # the second time is a repetition: both were paid for
        records.add_spent("s", cells[0].cell_id, 2, 0, Action.MEASURE, 0, 1.5)
    task = next(t for t in plan_tasks(cells, spec) if t.action is Action.MEASURE)
    records.add_attempt("s", task, Attempt(1, "rank 1 on h1: killed", "", Decision.REPEAT))
    yield records, cells
    records.close()


def test_it_says_what_runs_where_and_what_a_cell_cost(running):
    records, cells = running
    with claimed(records.path, "s"):
        values = status_values(records)
    (sweep,) = values["running"]
    assert sweep["at"] == {"launch": 1, "action": "measure", "cell": cells[0].cell_id}
    assert [(rank["rank"], rank["address"], rank["gpu"]) for rank in sweep["ranks"]] == [
        (0, "10.0.0.0", "H100"),
        (1, "10.0.0.1", "H100"),
    ]
    assert sweep["spent"] == [{"cell_id": cells[0].cell_id, "label": cells[0].label, "seconds": 3.0, "gpu_seconds": 6.0}]
    assert values["lease"]["cluster"] == "10.0.0.1:6379"
    assert values["sweeps"] == {"RUNNING": 1}
    text = "\n".join(status_lines(records))
    assert "1 on h" in text
    assert f"GPU-seconds: {cells[0].label} 6" in text
    assert "rank 1 on h1: killed" in text


def test_prometheus_can_read_it(running):
    records, _ = running
    with claimed(records.path, "s"):
        text = prometheus_text(status_values(records))
    assert text.endswith("\n")
    found = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            match = SAMPLE.match(line)
            assert match, line
            found.setdefault(match["name"], []).append((match["labels"], float(match["value"])))
    helped = re.findall(r"^# TYPE (\S+) gauge$", text, re.MULTILINE)
    assert set(found) == set(helped)
    assert len(helped) == len(set(helped)), "a family is said once"
    assert [value for _, value in found["cplab_cell_gpu_seconds"]] == [6.0]
    assert found["cplab_sweep_has_driver"][0][1] == 1
    assert found["cplab_sweep_failed_attempts"][0][1] == 1
    assert found["cplab_lease_held"][0][1] == 1
    assert len(found["cplab_rank_up"]) == 2
    assert 'host="h\\"0\\""' in found["cplab_rank_up"][0][0], "quotes are escaped"


def test_nothing_runs_and_what_ended_is_counted(running, tmp_path):
    records, _ = running
    records.end_sweep("s", SweepStatus.KILLED, "ended by SIGTERM")
    text = prometheus_text(status_values(records))
    assert 'cplab_sweeps{status="KILLED"} 1' in text
    assert "cplab_rank_up" not in text
    told = cplab("status", "--prometheus", home=tmp_path)
    assert told.returncode == 0
    assert 'cplab_sweeps{status="KILLED"} 1' in told.stdout
    refused(cplab("status", "--prometheus", "--json", home=tmp_path), "--json, --prometheus")
