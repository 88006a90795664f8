"""Rank groups across a link: each rank and its owner live in one end's namespace, the driver stays outside."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from service.run.local_ranks import LocalRank
from service.run.rank_group import RankGroup, Whereabouts
from tests.hosts.link import Link, Place
from tests.hosts.owner import Owner
from workers.affinity import share_of_cores

ROOT = Path(__file__).resolve().parents[2]
UP_S = 60.0


class NamespaceRank(LocalRank):
    """See `RankHandle`: a local rank whose host is in another process, in a namespace. Socket files, unlike ports, reach across."""

    def __init__(self, place: Place, cores: tuple[int, ...], spare_cores: int = 0) -> None:
        """`spare_cores`: of its cores, how many no operator of its main lane computes on.

        Raises:
            RuntimeError: The owner did not come up.
        """
        super().__init__()
        self._host.close()
        self._folder = tempfile.TemporaryDirectory(prefix="cplab-owner-")
        key = secrets.token_bytes(32)
        socket_file = f"{self._folder.name}/socket"
        self.owner = subprocess.Popen(
            place.command(sys.executable, "-m", "tests.hosts.owner", socket_file, *map(str, cores)),
            stdin=subprocess.PIPE,
            cwd=ROOT,
            env={**os.environ, "TORCH_CPP_LOG_LEVEL": "ERROR"},  # torch warns that a namespace has no resolver
            start_new_session=True,  # a Ctrl-C is the driver's to handle
        )
        try:
            assert self.owner.stdin is not None
            self.owner.stdin.write(key.hex().encode() + b"\n")
            self.owner.stdin.flush()
            self._host = self._connect(Owner(socket_file, key), place)
        except BaseException:
            self._end_owner()
            raise
        self.where = Whereabouts(
            place.namespace,
            place.namespace,
            place.address,
            place.interface,
            len(cores) - spare_cores,
            self.owner.pid,
            os.getpriority(os.PRIO_PROCESS, 0),
        )

    def _connect(self, owner: Owner, place: Place) -> Any:
        """A proxy of a `RankHost` there."""
        deadline_s = time.monotonic() + UP_S
        while self.owner.poll() is None and time.monotonic() < deadline_s:
            try:
                owner.connect()
                return owner.RankHost()
            except (FileNotFoundError, ConnectionRefusedError):
                time.sleep(0.02)
        raise RuntimeError(f"the owner of the rank in {place.namespace} did not come up")

    def kill(self) -> None:
        try:
            super().kill()
        finally:
            self._end_owner()

    def _end_owner(self) -> None:
        assert self.owner.stdin is not None
        self.owner.stdin.close()
        try:
            self.owner.wait(10)
        except subprocess.TimeoutExpired:
            self.owner.kill()
            self.owner.wait()
        self._folder.cleanup()


def link_group(link: Link, spare_cores: int = 0) -> RankGroup:
    """Two ranks, one at each end; each has its share of this process's cores, and leaves that many of them to its gather."""
    cores = sorted(os.sched_getaffinity(0))
    ranks: list[NamespaceRank] = []
    try:
        for index, place in enumerate(link.places):
            ranks.append(NamespaceRank(place, share_of_cores(cores, index, len(link.places)), spare_cores))
    except BaseException:
        for rank in ranks:
            rank.kill()
        raise
    return RankGroup(ranks)
