"""`ray_cluster.yaml` on a bench, as a site would use it: filled in, `ray up` from a client, the tunnel, `ray job submit`, `ray down`."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from typing import Any

import yaml

from tests.hosts.bench import Bench, Host

UP_S, JOIN_S, DOWN_S, LEFT_S = 180.0, 240.0, 120.0, 120.0
PORT = 8265
TOKEN = ("env", "RAY_AUTH_MODE=token", "RAY_USAGE_STATS_ENABLED=0")


def fill_in(bench: Bench, num_workers: int | None = None) -> None:
    """The four marked values of the client's `ray_cluster.yaml`, and nothing else of it."""
    path = bench.client.folder / "home/cplab/ray_cluster.yaml"
    config = yaml.safe_load(path.read_text())
    config["provider"] |= {"head_ip": bench.head.address, "worker_ips": [host.address for host in bench.workers[:num_workers]]}
    config["auth"] = {"ssh_user": "root", "ssh_private_key": str(bench.key)}
    path.write_text(yaml.safe_dump(config, width=100_000))


def ray_up(bench: Bench) -> None:
    """
    Raises:
        RuntimeError: The head did not come up.
    """
    bench.client.run("ray", "get-auth-token", "--generate")
    bench.client.run("ray", "up", "-y", "ray_cluster.yaml", cwd=f"{bench.client.home}/cplab", timeout_s=UP_S)


def nodes(host: Host) -> list[dict[str, Any]]:
    """The living nodes of the cluster of `host`, as Ray's state API has them; none while it does not answer."""
    done = host.run(*TOKEN, "ray", "list", "nodes", "--format=json", "--detail", "--filter", "state=ALIVE", check=False)
    return list(json.loads(done.stdout)) if done.returncode == 0 and done.stdout.lstrip().startswith("[") else []


def wait_for_nodes(bench: Bench, count: int) -> None:
    """
    Raises:
        RuntimeError: So many nodes are not there within `JOIN_S`.
    """
    deadline_s = time.monotonic() + JOIN_S
    while len(found := nodes(bench.head)) < count:
        if time.monotonic() > deadline_s:
            log = bench.head.run("sh", "-c", "tail -n 40 /tmp/ray/session_latest/logs/monitor.*", check=False).stdout
            raise RuntimeError(f"{len(found)} of {count} nodes joined:\n{log}")
        time.sleep(1)


@contextlib.contextmanager
def tunnel(bench: Bench) -> Iterator[None]:
    """From the client's loopback to the head's, as `ray dashboard` makes it.

    Raises:
        RuntimeError: It did not come up.
    """
    command = bench.client.command("ray", "dashboard", "ray_cluster.yaml", cwd=f"{bench.client.home}/cplab")
    with open(bench.client.folder / "tunnel.log", "wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline_s = time.monotonic() + 60
        while not any(where.endswith(f":{PORT}") for where in bench.client.listeners()):
            if time.monotonic() > deadline_s or process.poll() is not None:
                raise RuntimeError(f"no tunnel: {(bench.client.folder / 'tunnel.log').read_text()[-3000:]}")
            time.sleep(0.5)
        yield
    finally:
        for pid, args in bench.client.processes().items():
            if "ray dashboard" in args or f"-L {PORT}" in args:
                bench.client.run("kill", "-9", str(pid), check=False)
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGKILL)
        process.wait()


def submit(bench: Bench, *words: str, timeout_s: float = 400, env: Sequence[str] = TOKEN) -> subprocess.CompletedProcess[str]:
    """`ray job submit` of `python -m service WORDS` from the client, to its end."""
    job = [
        "ray",
        "job",
        "submit",
        "--working-dir",
        ".",
        "--runtime-env",
        "service/deploy/job.yaml",
        "--",
        "python",
        "-m",
        "service",
        *words,
    ]
    address = f"RAY_ADDRESS=http://127.0.0.1:{PORT}"
    return bench.client.run(*env, address, *job, cwd=f"{bench.client.home}/cplab", timeout_s=timeout_s, check=False)


def ray_down(bench: Bench) -> dict[str, Any]:
    """`ray down`, and what is left on each host when nothing more goes, or after `LEFT_S`: empty where nothing is.

    Raises:
        RuntimeError: `ray down` failed.
    """
    bench.client.run("ray", "down", "-y", "ray_cluster.yaml", cwd=f"{bench.client.home}/cplab", timeout_s=DOWN_S)
    deadline_s = time.monotonic() + LEFT_S
    while True:
        left = {host.name: (host.processes(), host.listeners()) for host in bench.nodes}
        left = {name: found for name, found in left.items() if found != ({}, [])}
        if not left or time.monotonic() > deadline_s:
            return left
        time.sleep(1)
