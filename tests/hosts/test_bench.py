"""The bench itself: its hosts share nothing but a kernel, are as near or far as they are told, and leave nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hosts.bench import INTERFACE, ROOT, bench, wait_for_ssh
from tests.hosts.link import LinkError, namespaces, remove_leftovers
from tests.hosts.test_link import wait_until_gone

pytestmark = pytest.mark.hosts

KILLED = """
import time
from tests.hosts.bench import bench
with bench(1) as found:
    found.head.run("sh", "-c", "setsid sleep 300 > /dev/null 2>&1 &")
    print(found.folder, *[host.namespace for host in found.hosts], *[host.pid for host in found.hosts], flush=True)
    time.sleep(60)
"""


@pytest.fixture(scope="module")
def hosts(needs_a_bench):
    with bench(2) as found:
        wait_for_ssh(found)
        yield found


def reaches(hosts):
    """Whether a connection from the head to the worker's sshd comes up."""
    word = f"exec 3<>/dev/tcp/{hosts.workers[0].address}/22"
    return hosts.head.run("timeout", "2", "bash", "-c", word, check=False).returncode == 0


def test_hosts_share_nothing(hosts):
    for host in hosts.hosts:
        host.run("sh", "-c", "echo $(hostname) > /tmp/mark; cp /tmp/mark /dev/shm/mark; cp /tmp/mark ~/mark")
    for host in hosts.hosts:
        for place in ("/tmp/mark", "/dev/shm/mark", f"{host.home}/mark"):
            assert host.run("cat", place).stdout.strip() == host.name
        assert host.address in host.run("ip", "-br", "address").stdout
        assert host.processes() == {}
        assert host.listeners() == []
    assert not Path("/tmp/mark").exists()


def test_a_host_cannot_change_what_the_tests_run_from(hosts):
    done = hosts.head.run("touch", str(ROOT / "README.md"), check=False)
    assert "Read-only" in done.stderr


def test_links_are_shaped_both_ways_and_cut_and_mended(hosts):
    hosts.shape(20)
    for namespace, device in ((hosts.head.namespace, INTERFACE), (hosts.switch, hosts.head.port)):
        shown = subprocess.run(
            ["tc", "-n", namespace, "qdisc", "show", "dev", device], capture_output=True, text=True, check=True
        )
        assert "rate 20Mbit burst 16Kb" in shown.stdout
    hosts.shape(None)
    assert reaches(hosts)
    hosts.cut(hosts.workers[0])
    assert not reaches(hosts)
    hosts.mend(hosts.workers[0])
    assert reaches(hosts)


def test_a_relay_makes_a_link_long(needs_a_bench):
    with bench(1, latency_us=20_000) as found:
        wait_for_ssh(found)
        word = f"import socket, time; t = time.monotonic(); socket.create_connection(('{found.head.address}', 22)); print(time.monotonic() - t)"
        asking = found.client.command(sys.executable, "-I", "-c", word)
        took_s = [float(subprocess.run(asking, capture_output=True, check=True, timeout=60).stdout) for _ in range(3)]
    assert min(took_s) > 0.08  # there and back, two cables each way


def test_a_host_that_cannot_come_up_leaves_nothing(needs_a_bench, monkeypatch):
    monkeypatch.setattr("tests.hosts.bench.ROOT", ROOT / "nowhere")
    monkeypatch.setattr("tests.hosts.bench.CHECKOUT", ())
    monkeypatch.setattr("tests.hosts.bench._install", lambda venv: None)
    before = set(namespaces())
    with pytest.raises(LinkError, match="host h0 did not come up"), bench(1):
        pass
    assert set(namespaces()) == before


def test_hosts_go_with_their_maker_and_the_rest_with_the_next_bench(needs_a_bench):
    maker = subprocess.Popen([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert maker.stdout is not None
        folder, first, second, *pids = maker.stdout.readline().split()
        assert all(os.path.exists(f"/proc/{pid}") for pid in pids)
    finally:
        maker.kill()
        maker.wait()
    assert wait_until_gone([int(pid) for pid in pids]) == []
    with bench(1):
        assert not Path(folder).exists()
    remove_leftovers()
    assert not {first, second} & set(namespaces())
