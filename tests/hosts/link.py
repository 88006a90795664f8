"""A real, slow link on one machine: two network namespaces joined by a veth pair that the kernel's token bucket (`tc tbf`) paces.

Everything lives inside the two namespaces; the machine's own network is not touched. Needs root, `ip` and `tc`.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

INTERFACE = "link0"
BURST_BYTES = 16 * 1024
"""The bucket. A larger one lets a gather of this size through for nothing and fills again during compute: overlap would look better
than it can be. A smaller one is under tbf's own granularity at the higher rates."""
MTU_BYTES = 9000
"""Jumbo frames, as between hosts made for this. With 1500 bytes six times as many interrupts take the two cores that rotate: an overlap would pay for
how the link is played."""
FRAME_BYTES, SEGMENT_BYTES = MTU_BYTES + 14, MTU_BYTES - 52
"""What tbf counts for a full frame, and what TCP carries in it (timestamps on)."""

_NAME = re.compile(r"^cplab-(\d+)-[0-9a-f]+-[0-9s]$")


class LinkError(Exception):
    """A namespace or its shaping could not be made; names the command and what it said."""


@dataclass(frozen=True)
class Place:
    """One end of the link."""

    namespace: str
    address: str
    interface: str = INTERFACE

    def command(self, *words: str) -> list[str]:
        """The command line that runs `words` in this namespace; it replaces itself by them, so its pid is theirs."""
        return ["ip", "netns", "exec", self.namespace, *words]


@dataclass(frozen=True)
class Link:
    """Both ends, and the pace in each direction; `rate_mbps` is None for a veth pair as it comes."""

    places: tuple[Place, Place]
    rate_mbps: float | None

    def floor_us(self, payload_bytes: int) -> float | None:
        """The least time for that much TCP payload one way, headers counted, the full bucket spent; None when unshaped."""
        if self.rate_mbps is None:
            return None
        return max(0.0, payload_bytes * FRAME_BYTES / SEGMENT_BYTES - BURST_BYTES) * 8 / self.rate_mbps


def missing_piece() -> str | None:
    """Why no shaped link can be made here; None when one can (one was made, and removed)."""
    if os.geteuid() != 0:
        return "root"
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            return f"the command `{tool}` (iproute2)"
    try:
        with shaped_link(100):
            return None
    except LinkError as error:
        return f"a kernel and permissions for network namespaces with tbf ({error})"


@contextlib.contextmanager
def shaped_link(rate_mbps: float | None) -> Iterator[Link]:
    """A link for the time of the block. It goes whatever happens in the block; what a killed process left goes with the next link.

    Raises:
        LinkError: A command failed.
    """
    remove_leftovers()
    stem = f"cplab-{os.getpid()}-{secrets.token_hex(2)}"
    places = Place(f"{stem}-0", "10.203.0.1"), Place(f"{stem}-1", "10.203.0.2")
    try:
        for place in places:
            do("ip", "netns", "add", place.namespace)
        first, second = places
        peer = ("peer", "name", INTERFACE, "netns", second.namespace)
        do("ip", "-n", first.namespace, "link", "add", INTERFACE, "type", "veth", *peer)
        for place in places:
            do("ip", "-n", place.namespace, "address", "add", f"{place.address}/30", "dev", INTERFACE)
            do("ip", "-n", place.namespace, "link", "set", INTERFACE, "mtu", str(MTU_BYTES))
            for interface in ("lo", INTERFACE):
                do("ip", "-n", place.namespace, "link", "set", interface, "up")
            if rate_mbps is not None:
                bucket = ("rate", f"{rate_mbps:g}mbit", "burst", str(BURST_BYTES), "latency", "400ms")
                do("tc", "-n", place.namespace, "qdisc", "add", "dev", INTERFACE, "root", "tbf", *bucket)
        yield Link(places, rate_mbps)
    finally:
        for place in places:
            remove(place.namespace)


def namespaces() -> list[str]:
    """Names of all namespaces of ours on this machine, whoever made them."""
    done = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=False, timeout=30)
    names = [line.split()[0] for line in done.stdout.splitlines() if line.strip()]
    return [name for name in names if _NAME.match(name)]


def remove_leftovers() -> None:
    """Removes namespaces whose maker is dead; a living process's stay."""
    for name in namespaces():
        found = _NAME.match(name)
        if found and not os.path.exists(f"/proc/{found[1]}"):
            remove(name)


def remove(namespace: str) -> None:
    """Also when it was never made. The veth pair goes with its namespaces."""
    subprocess.run(["ip", "netns", "delete", namespace], capture_output=True, check=False, timeout=30)


def do(*command: str) -> None:
    """
    Raises:
        LinkError: It failed; with what it said.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    if done.returncode:
        raise LinkError(f"`{' '.join(command)}`: {done.stderr.strip() or done.returncode}")
