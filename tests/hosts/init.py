"""The first process of a bench's host: gives the host its own name, /tmp, /dev/shm, HOME and sshd, and ends with its maker.

It is the init of a pid namespace, so the kernel ends everything that runs on the host with it.

ip netns exec NAMESPACE unshare --mount --uts --pid --fork --mount-proc python -I tests/hosts/init.py FOLDER NAME CHECKOUT CORE     # stdin stays open
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

SHM_BYTES = 512 * 2**20


def _mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True, timeout=30)


def main() -> None:
    bench, name, checkout = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    mine = bench / name
    socket.sethostname(name)
    os.sched_setaffinity(
        0, {int(sys.argv[4])}
    )  # a rank's threads are counted from its host's cores: hosts may share one, not fight for all
    _mount("--bind", str(mine / "passwd"), "/etc/passwd")
    _mount("--bind", str(bench / "hosts"), "/etc/hosts")
    _mount("--bind", str(mine / "home"), str(bench / "home"))
    _mount("-t", "tmpfs", "-o", f"size={SHM_BYTES}", "shm", "/dev/shm")
    _mount("-t", "tmpfs", "run", "/run")
    Path("/run/sshd").mkdir(mode=0o755)
    _mount("--bind", str(checkout), str(checkout))
    _mount("-o", "remount,bind,ro", str(checkout))  # no host's command may change what the tests run from
    if checkout.is_relative_to("/tmp"):  # a clone somewhere below it must not vanish under the host's own
        inside = mine / "tmp" / checkout.relative_to("/tmp")
        inside.mkdir(parents=True, exist_ok=True)
        _mount("--rbind", str(checkout), str(inside))
    _mount("--rbind", str(mine / "tmp"), "/tmp")
    with open(mine / "sshd.log", "ab") as log:
        subprocess.Popen(["/usr/sbin/sshd", "-D", "-e", "-f", str(bench / "sshd_config")], stdin=subprocess.DEVNULL, stderr=log)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # orphans of the host come here: the kernel buries them
    print("up", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
