"""A cable with a length: two TAP devices, and every frame of one comes out of the other a stated time later. For kernels without netem.

ip netns exec SWITCH python -I tests/hosts/relay.py PORT FAR LATENCY_US     # makes both there; stdin stays open
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import struct
import sys
import time
from collections import deque

TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
FRAME_BYTES = 65536


def tap(name: str) -> int:
    """A new TAP device of that name in this namespace, and the file that its frames go through; it stays valid when the device moves on."""
    end = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(end, TUNSETIFF, struct.pack("16sH", name.encode(), IFF_TAP | IFF_NO_PI))
    return end


def main() -> None:
    ends = tap(sys.argv[1]), tap(sys.argv[2])
    latency_s = float(sys.argv[3]) / 1e6
    other = {ends[0]: ends[1], ends[1]: ends[0]}
    on_the_way: deque[tuple[float, int, bytes]] = deque()  # in order of arrival, since all take the same time
    print("up", flush=True)
    while True:
        wait_s = max(0.0, on_the_way[0][0] - time.monotonic()) if on_the_way else None
        ready, _, _ = select.select([*ends, sys.stdin], [], [], wait_s)
        if sys.stdin in ready:
            return  # the maker is gone
        for end in ready:
            try:
                while True:
                    on_the_way.append((time.monotonic() + latency_s, other[end], os.read(end, FRAME_BYTES)))
            except OSError:  # nothing more to read, or the device is down
                pass
        while on_the_way and on_the_way[0][0] <= time.monotonic():
            _, end, frame = on_the_way.popleft()
            with contextlib.suppress(OSError):  # a device that is down loses frames, as a cable does
                os.write(end, frame)


if __name__ == "__main__":
    main()
