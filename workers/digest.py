"""Digests: 64 bits that stand for a tensor's bytes, so that runs and ranks are compared bit for bit without moving tensors."""

from __future__ import annotations

import torch

_SEED = 0x5EED
_multipliers: dict[torch.device, torch.Tensor] = {}


def digest(tensor: torch.Tensor) -> int:
    """A position-weighted sum of the bytes modulo 2^64, at the speed of memory.

    Every 8-byte word has its own random odd multiplier, so any single changed word changes the digest, and rows that trade places
    do too (a chance of about 2^-63 otherwise). Not cryptographic: it guards against races, not against forgers.
    """
    octets = tensor.detach().contiguous().view(torch.uint8).view(-1)
    tail = -octets.numel() % 8
    if tail:
        octets = torch.cat([octets, octets.new_zeros(tail)])
    words = octets.view(torch.int64)
    return int((words * _multipliers_for(words.numel(), words.device)).sum())


def _multipliers_for(count: int, device: torch.device) -> torch.Tensor:
    """The same ones on every device, kept on each."""
    if device not in _multipliers or _multipliers[device].numel() < count:
        generator = torch.Generator().manual_seed(_SEED)
        size = 1 << max(count - 1, 1).bit_length()
        low, high = -(2**62), 2**62
        drawn = torch.randint(low, high, (size,), generator=generator, dtype=torch.int64) * 2 + 1
        _multipliers[device] = drawn.to(device)
    return _multipliers[device][:count]
