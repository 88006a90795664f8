"""The owner of one rank inside a network namespace: serves a `RankHost` on a socket file, and ends when its maker does.

ip netns exec NAMESPACE python -m tests.hosts.owner SOCKET CORE...     # the key of the connection on stdin, which then stays open

What it starts keeps to those cores: hosts do not share theirs.
"""

from __future__ import annotations

import os
import sys
import threading
from multiprocessing.managers import BaseManager

from workers.host import RankHost


class Owner(BaseManager):
    """Gives proxies of rank hosts. Each calling thread has a connection and a thread of its own here, so a stack can be asked for while
    the rank works."""


Owner.register("RankHost", RankHost)


def _end_with_the_maker() -> None:
    sys.stdin.read()
    os._exit(0)  # the rank and the fork server see it, and end too


def main() -> None:
    os.sched_setaffinity(0, map(int, sys.argv[2:]))
    key = bytes.fromhex(sys.stdin.readline())
    threading.Thread(target=_end_with_the_maker, daemon=True).start()
    Owner(sys.argv[1], key).get_server().serve_forever()


if __name__ == "__main__":
    main()
