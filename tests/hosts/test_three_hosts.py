"""`ray_cluster.yaml` on three hosts and a client: up over SSH, a submitted run with ranks on all three, down, and nothing left.

The tests of this file are the steps of one story, in order.
"""

from __future__ import annotations

import json
import time

import pytest

from experiments.names import SweepStatus, Verdict
from tests.hosts.bench import bench, wait_for_ssh
from tests.hosts.launcher import TOKEN, fill_in, nodes, ray_down, ray_up, submit, tunnel, wait_for_nodes
from tests.hosts.reduced import last_result, words_of

pytestmark = [pytest.mark.hosts, pytest.mark.timeout(900)]

SETTINGS = words_of(["measurement.launches=6", "measurement.aa=false"])


@pytest.fixture(scope="module")
def hosts(needs_a_bench):
    with bench() as found:
        wait_for_ssh(found)
        fill_in(found)
        ray_up(found)
        wait_for_nodes(found, 3)
        yield found


def test_every_host_joins_and_only_loopback_has_the_dashboard(hosts):
    assert {node["node_ip"] for node in nodes(hosts.head)} == {host.address for host in hosts.nodes}
    assert [where for where in hosts.head.listeners() if where.endswith(":8265")] == ["127.0.0.1:8265"]
    for host in hosts.nodes:
        token = host.run("stat", "-c", "%a", f"{host.home}/.ray/auth_token").stdout.strip()
        assert token == "600"


def test_without_the_token_nobody_gets_in(hosts):
    asking = "import ray; ray.init(address='10.204.0.10:6379', log_to_driver=False)"
    done = hosts.workers[0].run("env", "HOME=/tmp", "RAY_AUTH_MODE=disabled", "python", "-c", asking, check=False, timeout_s=90)
    assert done.returncode != 0
    assert "oken" in done.stderr


GROUPS = """
import sys, json
from experiments.spec.placement import PlacementSpec
from service.run.cluster import connect
from service.run.ray_ranks import ray_group
with connect():
    for num_ranks, asked in json.loads(sys.argv[1]):
        group = ray_group(num_ranks, PlacementSpec(**asked), 60)
        print("map", json.dumps([handle.where.hostname for handle in group.handles]), flush=True)
        group.close()
"""


def test_ranks_lie_as_asked_and_in_the_order_of_the_nodes(hosts):
    head = next(node["node_id"] for node in nodes(hosts.head) if node["is_head_node"])
    asked = [
        (6, {"ranks_per_node": 2}),
        (4, {"nodes": 2, "node_labels": {"ray.io/node-id": f"!{head}"}}),
        (2, {"ranks_per_node": 2, "node_labels": {"ray.io/node-id": head}}),
        (3, {"strategy": "STRICT_SPREAD"}),
    ]
    command = [*TOKEN, "RAY_ADDRESS=127.0.0.1:6379", "python", "-c", GROUPS, json.dumps(asked)]
    said = hosts.head.run(*command, cwd=f"{hosts.head.home}/cplab", timeout_s=200).stdout.splitlines()
    maps = [json.loads(line.removeprefix("map ")) for line in said if line.startswith("map ")]
    assert maps == [["h0", "h0", "h1", "h1", "h2", "h2"], ["h1", "h1", "h2", "h2"], ["h0", "h0"], ["h0", "h1", "h2"]]


def test_overlap_wins_on_a_slow_link(hosts):
    with tunnel(hosts):
        hosts.shape(20)
        began_s = time.monotonic()
        try:
            done = submit(hosts, "run", "overlap_vs_baseline", "--set", "placement.ranks_per_node=1", *SETTINGS)
        finally:
            hosts.shape(None)
    print(f"{time.monotonic() - began_s:.0f} s", done.stdout[-3000:], done.stderr[-2000:])
    assert done.returncode == 0, done.stdout + done.stderr
    result = last_result(hosts)
    assert result.status is SweepStatus.FINISHED
    for launch in result.environment["launches"]:
        assert [rank["hostname"] for rank in launch["ranks"]] == [host.name for host in hosts.nodes]
        assert [rank["address"] for rank in launch["ranks"]] == [host.address for host in hosts.nodes]
        assert {rank["interface"] for rank in launch["ranks"]} == {"eth0"}
    cell = result.cells[0]
    assert "eth0" in cell.path
    overlapped = cell.arms[1]
    assert overlapped.verdict is Verdict.FASTER
    assert overlapped.account.saved_us.low > 0
    hidden, ideal = overlapped.account.hidden, overlapped.account.hidden_ideal
    assert hidden is not None and ideal is not None, "too noisy for a share: is the machine quiet?"
    assert hidden.low > 0
    assert hidden.low <= ideal.high
    assert ideal.low <= hidden.high


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            ["placement.ranks_per_node=3", "placement.cpus_per_rank=1"],
            "placement.ranks_per_node 3: 3 ranks inside one node: needs 3 CPUs",
        ),
        (
            ["placement.ranks_per_node=1", "placement.interfaces=ib0"],
            "placement.interfaces: asked for ib0, and h0 (10.204.0.10) has none of them",
        ),
    ],
)
def test_another_map_than_asked_refuses_the_run(hosts, settings, says):
    with tunnel(hosts):
        done = submit(
            hosts, "run", "overlap_vs_baseline", *SETTINGS, *(word for setting in settings for word in ("--set", setting))
        )
    assert done.returncode != 0
    assert says in done.stdout + done.stderr


def test_ray_down_leaves_nothing(hosts):
    actors = hosts.head.run(*TOKEN, "ray", "list", "actors", "--format=json", "--filter", "state=ALIVE").stdout
    assert "RankOwner" not in actors
    assert ray_down(hosts) == {}
