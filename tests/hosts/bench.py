"""Several hosts on one machine: each a network, mount, pid and host-name namespace with an address, sshd, /tmp, /dev/shm and HOME of its own.

A bridge in one more namespace joins them; the machine's own network is not touched. Needs root, iproute2, util-linux, OpenSSH and rsync.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.hosts.link import BURST_BYTES, LinkError, do, missing_piece, remove, remove_leftovers

ROOT = Path(__file__).resolve().parents[2]
INTERFACE = "eth0"
UP_S = 30.0
TOOLS = {
    "/usr/sbin/sshd": "openssh-server",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "rsync": "rsync",
    "unshare": "util-linux",
    "nsenter": "util-linux",
}
CHECKOUT = ("experiments", "workers", "service", "pyproject.toml", "constraints.txt", "README.md", "ray_cluster.yaml")
_FOLDER = re.compile(r"^cplab-bench-(\d+)-")
SSHD = """\
HostKey {bench}/host_key
AuthorizedKeysFile {bench}/user_key.pub
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin yes
PidFile none
MaxStartups 100
MaxSessions 100
"""


def missing_bench_piece() -> str | None:
    """Why no bench can be made here; None when one can."""
    for tool, package in TOOLS.items():
        if shutil.which(tool) is None:
            return f"the command `{tool}` ({package})"
    return missing_piece()


@dataclass(frozen=True)
class Host:
    """One host, up."""

    name: str
    address: str
    namespace: str
    port: str
    """Its end in the switch."""
    home: Path
    """HOME as the host sees it; the same path on every host."""
    folder: Path
    """Where the machine sees its home/ and tmp/."""
    process: subprocess.Popen[bytes]
    pid: int
    """Of its init, as the machine sees it."""

    def command(self, *words: str, cwd: str | None = None) -> list[str]:
        """The command line that runs `words` on this host, with the environment of a login there and nothing of ours."""
        path = f"PATH={self.home}/cplab/.venv/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        login = ["env", "-i", "-C", cwd or str(self.home), f"HOME={self.home}", "USER=root", "LANG=C.UTF-8", path]
        inside = ["nsenter", "-t", str(self.pid), "-m", "-n", "-p", "-u", "--wd=/"]
        return [*inside, *login, *words]

    def run(
        self, *words: str, cwd: str | None = None, timeout_s: float = 60, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Runs it and waits; what it said is with the error too.

        Raises:
            RuntimeError: It failed, or took longer.
        """
        bounded = self.command("timeout", "--kill-after=5", f"{timeout_s:g}", *words, cwd=cwd)
        done = subprocess.run(
            bounded, capture_output=True, text=True, timeout=timeout_s + 15, check=False, stdin=subprocess.DEVNULL
        )
        if check and done.returncode:
            raise RuntimeError(
                f"{self.name}: `{' '.join(words)}` ended with {done.returncode}:\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
            )
        return done

    def processes(self) -> dict[int, str]:
        """pid there -> command line, without the host's own init and sshd, and without this question."""
        lines = self.run("ps", "-eo", "pid=,args=").stdout.splitlines()
        found = {int(line.split()[0]): " ".join(line.split()[1:]) for line in lines}
        asking = ("ps -eo", "timeout --kill-after", "sshd")
        return {
            pid: args
            for pid, args in found.items()
            if pid != 1 and not any(word in args[:40] for word in asking) and "<defunct>" not in args
        }

    def listeners(self) -> list[str]:
        """Local addresses that something on it listens at, but for its sshd."""
        lines = self.run("ss", "-Hltn").stdout.splitlines()
        return [where for line in lines if not (where := line.split()[3]).endswith(":22")]


@dataclass(frozen=True)
class Bench:
    """The hosts. The first is the cluster's head, the last the client that is no part of it."""

    hosts: tuple[Host, ...]
    switch: str
    folder: Path

    @property
    def head(self) -> Host:
        return self.hosts[0]

    @property
    def workers(self) -> tuple[Host, ...]:
        return self.hosts[1:-1]

    @property
    def client(self) -> Host:
        return self.hosts[-1]

    @property
    def nodes(self) -> tuple[Host, ...]:
        return self.hosts[:-1]

    @property
    def key(self) -> Path:
        """The private key that logs in everywhere."""
        return self.folder / "user_key"

    def shape(self, rate_mbps: float | None) -> None:
        """Every node sends and receives at that pace from now on; None: as the machine can."""
        for host in self.nodes:
            for namespace, device in ((host.namespace, INTERFACE), (self.switch, host.port)):
                subprocess.run(
                    ["tc", "-n", namespace, "qdisc", "del", "dev", device, "root"], capture_output=True, check=False, timeout=30
                )
                if rate_mbps is not None:
                    bucket = ("rate", f"{rate_mbps:g}mbit", "burst", str(BURST_BYTES), "latency", "400ms")
                    do("tc", "-n", namespace, "qdisc", "add", "dev", device, "root", "tbf", *bucket)

    def cut(self, host: Host) -> None:
        """Nothing reaches it any more, nor leaves it."""
        do("ip", "-n", self.switch, "link", "set", host.port, "down")

    def mend(self, host: Host) -> None:
        do("ip", "-n", self.switch, "link", "set", host.port, "up")


@contextlib.contextmanager
def bench(num_nodes: int = 3, latency_us: float = 0) -> Iterator[Bench]:
    """Hosts h0 (the head) to h{num_nodes - 1}, and the client, for the time of the block; each `latency_us` away from the switch.

    They go whatever happens in it; when this process is killed, so are they, and the rest goes with the next bench.

    Raises:
        LinkError: A command failed, or a host did not come up.
    """
    remove_leftovers()
    remove_left_folders()
    stem = f"cplab-{os.getpid()}-{secrets.token_hex(2)}"
    folder = Path(tempfile.mkdtemp(prefix=f"cplab-bench-{os.getpid()}-", dir="/var/tmp"))  # sockets below it: keep it short
    switch = f"{stem}-s"
    hosts: list[Host] = []
    relays: list[subprocess.Popen[bytes]] = []
    names = [f"h{index}" for index in range(num_nodes)] + ["client"]
    try:
        _prepare(folder, names)
        do("ip", "netns", "add", switch)
        do("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
        do("ip", "-n", switch, "link", "set", "bridge", "up")
        for index, name in enumerate(names):
            do("ip", "netns", "add", f"{stem}-{index}")
            relays += _join(f"{stem}-{index}", index, switch, latency_us)
            hosts.append(_start(folder, f"{stem}-{index}", name, index))
        yield Bench(tuple(hosts), switch, folder)
    finally:
        for process in [*(host.process for host in hosts), *relays]:
            _stop(process)
        for namespace in [*(f"{stem}-{index}" for index in range(len(names))), switch]:
            remove(namespace)
        shutil.rmtree(folder, ignore_errors=True)


def address_of(index: int) -> str:
    return f"10.204.0.{10 + index}"


def remove_left_folders() -> None:
    """Folders whose maker is dead."""
    for path in Path("/var/tmp").glob("cplab-bench-*"):
        found = _FOLDER.match(path.name)
        if found and not os.path.exists(f"/proc/{found[1]}"):
            shutil.rmtree(path, ignore_errors=True)


def _prepare(folder: Path, names: list[str]) -> None:
    """Keys, and every host's files: an empty home but for the environment that a site has installed there."""
    for key in ("host_key", "user_key"):
        do("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key))
    (folder / "home").mkdir()
    (folder / "sshd_config").write_text(SSHD.format(bench=folder))
    lines = ["127.0.0.1 localhost", *(f"{address_of(index)} {name}" for index, name in enumerate(names))]
    (folder / "hosts").write_text("\n".join(lines) + "\n")
    folder.chmod(0o755)
    for name in names:
        mine = folder / name
        for part in ("home", "tmp"):
            (mine / part).mkdir(parents=True)
        (mine / "passwd").write_text(f"root:x:0:0:root:{folder}/home:/bin/bash\nsshd:x:101:65534::/run/sshd:/usr/sbin/nologin\n")
        (mine / "home/.bashrc").write_text("")
        _install(mine / "home/cplab/.venv")
    for part in CHECKOUT:
        source, target = ROOT / part, folder / names[-1] / "home/cplab" / part
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)


def _install(venv: Path) -> None:
    """This environment, where the launcher would install it, with the mark that says it is already there: hosts here reach no registry."""
    venv.mkdir(parents=True)
    for part in Path(sys.prefix).iterdir():
        (venv / part.name).symlink_to(part)
    listed = subprocess.run(
        ["sha256sum", "pyproject.toml", "constraints.txt"], cwd=ROOT, capture_output=True, check=True, timeout=30
    )
    (venv / ".installed").unlink(missing_ok=True)
    (venv / ".installed").write_bytes(listed.stdout)


def _join(namespace: str, index: int, switch: str, latency_us: float) -> list[subprocess.Popen[bytes]]:
    """A cable from the switch to a host, and the relay behind it, if any."""
    port, relays = f"p{index}", []
    if latency_us:
        relay = [sys.executable, "-I", str(Path(__file__).parent / "relay.py"), port, f"{port}far", f"{latency_us:g}"]
        relays.append(_begin(["ip", "netns", "exec", switch, *relay], None, f"the relay of {port}"))
        do("ip", "-n", switch, "link", "set", f"{port}far", "netns", namespace, "name", INTERFACE)
    else:
        do("ip", "-n", switch, "link", "add", port, "type", "veth", "peer", "name", INTERFACE, "netns", namespace)
    do("ip", "-n", switch, "link", "set", port, "master", "bridge", "up")
    do("ip", "-n", namespace, "address", "add", f"{address_of(index)}/24", "dev", INTERFACE)
    for interface in ("lo", INTERFACE):
        do("ip", "-n", namespace, "link", "set", interface, "up")
    return relays


def _start(folder: Path, namespace: str, name: str, index: int) -> Host:
    cores = sorted(os.sched_getaffinity(0))
    spaces = ["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
    init = [sys.executable, "-I", str(ROOT / "tests/hosts/init.py"), str(folder), name, str(ROOT), str(cores[index % len(cores)])]
    process = _begin(["ip", "netns", "exec", namespace, *spaces, *init], folder / name / "init.log", f"host {name}")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return Host(name, address_of(index), namespace, f"p{index}", folder / "home", folder / name, process, int(children[0]))


def _begin(command: list[str], log: Path | None, what: str) -> subprocess.Popen[bytes]:
    """A process that says when it is up, and ends with its stdin.

    Raises:
        LinkError: It ended instead.
    """
    with open(log or os.devnull, "wb") as errors:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"},
            start_new_session=True,  # a Ctrl-C is the maker's to handle
        )
    assert process.stdout is not None
    if process.stdout.readline() != b"up\n":
        process.kill()
        process.wait()
        raise LinkError(f"{what} did not come up: {log.read_text()[-2000:] if log else ''}")
    return process


def _stop(process: subprocess.Popen[bytes]) -> None:
    """The kernel ends all that runs on a host with its init."""
    assert process.stdin is not None
    process.stdin.close()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def wait_for_ssh(found: Bench) -> None:
    """Until every host lets the client in.

    Raises:
        RuntimeError: One does not within `UP_S`.
    """
    options = [
        "-o",
        "StrictHostKeyChecking=no",
        "-o",
        "UserKnownHostsFile=/dev/null",
        "-o",
        "LogLevel=ERROR",
        "-o",
        "ConnectTimeout=5",
    ]
    for host in found.nodes:
        deadline_s = time.monotonic() + UP_S
        while found.client.run("ssh", *options, "-i", str(found.key), f"root@{host.address}", "true", check=False).returncode:
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"{host.name} lets nobody in: {(host.folder / 'sshd.log').read_text()[-2000:]}")
            time.sleep(0.2)
