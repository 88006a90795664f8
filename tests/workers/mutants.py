"""Broken schedules, each by one plausible slip. Every one must be called INVALID."""

from __future__ import annotations

import torch

_stale: list[torch.Tensor] = []


def no_join(ix, shard, fabric):
    """Reads the destination without waiting for the gather."""
    q, k = ix.project(shard)
    gathering = fabric.start_gather(ix.rotate(k))
    return ix.rotate(q), gathering.keys


def joins_too_late(ix, shard, fabric):
    """Copies the keys out before the join: the wait is there, in the wrong place."""
    q, k = ix.project(shard)
    gathering = fabric.start_gather(ix.rotate(k))
    keys = gathering.keys.clone()
    q = ix.rotate(q)
    gathering.join()
    return q, keys


def no_fork(ix, shard, fabric):
    """The side lane starts on a buffer that the main lane has yet to fill."""
    q, k = ix.project(shard)
    rotated = torch.empty_like(k)
    gathering = fabric.start_gather(rotated)
    q = ix.rotate(q)
    rotated.copy_(ix.rotate(k))
    return q, gathering.join()


def gathers_before_rotation(ix, shard, fabric):
    """Sends k as it is projected, and forgets that the rotation comes first."""
    q, k = ix.project(shard)
    gathering = fabric.start_gather(k)
    q = ix.rotate(q)
    return q, gathering.join()


def reuses_buffer(ix, shard, fabric):
    """Returns the keys of the run before."""
    q, k = ix.project(shard)
    keys = fabric.start_gather(ix.rotate(k)).join()
    _stale.append(keys.clone())
    return ix.rotate(q), _stale[-2] if len(_stale) > 1 and _stale[-2].shape == keys.shape else keys


def never_rotates_q(ix, shard, fabric):
    q, k = ix.project(shard)
    return q, fabric.gather(ix.rotate(k))


def gathers_twice(ix, shard, fabric):
    q, k = ix.project(shard)
    k = ix.rotate(k)
    fabric.gather(k)
    return ix.rotate(q), fabric.gather(k)


def returns_nothing(ix, shard, fabric):
    ix.project(shard)


def raises(ix, shard, fabric):
    raise KeyError("a user's bug")


def overlap_again(ix, shard, fabric):
    """Not a mutant: PR #20438's order as a user would write it."""
    q, k = ix.project(shard)
    gathering = fabric.start_gather(ix.rotate(k))
    q = ix.rotate(q)
    return q, gathering.join()


def forks_its_own(ix, shard, fabric):
    """Right, and on the side lane by its own hand too: k is rotated there."""
    q, k = ix.project(shard)
    k = ix.lanes.fork(lambda: ix.rotate(k)).join()
    gathering = fabric.start_gather(k)
    q = ix.rotate(q)
    return q, gathering.join()
