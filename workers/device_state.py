"""What a GPU was doing at a moment: clocks, what held them down, heat, power, memory."""

from __future__ import annotations

from dataclasses import dataclass

SLOWDOWNS = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "heat (software)",
    0x40: "heat (hardware)",
    0x80: "power brake",
}
"""Bits of NVML's clock event reasons that make a GPU slower than it could be; idleness and chosen clocks are none."""


@dataclass(frozen=True)
class DeviceState:
    """One GPU. What only NVML knows is None without it.

    Attributes:
        peak_memory_mib: The most that torch has held since the process began.
        sm_mhz, memory_mhz: Clocks.
        slowdowns: Of `SLOWDOWNS`.
    """

    peak_memory_mib: float
    sm_mhz: int | None = None
    memory_mhz: int | None = None
    temperature_c: int | None = None
    power_w: float | None = None
    slowdowns: tuple[str, ...] = ()
