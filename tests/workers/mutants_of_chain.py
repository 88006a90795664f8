"""Schedules that are right in a layer by itself and wrong between layers. Every one must be called INVALID.

A rank process holds their state; `CHAIN` is the number of layers of the tests' chains.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import torch

from workers.schedules import overlap_rotate

CHAIN = 3
_calls = [0]
_keys: list[torch.Tensor] = []
_gatherings: list = []
_inputs: list = []
_shared: dict[torch.Size, torch.Tensor] = {}
_copier = ThreadPoolExecutor(1)


def _layer() -> int:
    """Which layer of its chain this call is: every chain calls a schedule once for each."""
    _calls[0] += 1
    return (_calls[0] - 1) % CHAIN


def stale_keys_in_the_middle(ix, shard, fabric):
    """The middle layer hands the next one the keys of the layer before; the last layer's own gather is right."""
    q, keys = overlap_rotate(ix, shard, fabric)
    layer = _layer()
    _keys[:] = [*_keys[-1:], keys]
    return q, _keys[0] if layer == 1 else keys


def no_join_in_the_middle(ix, shard, fabric):
    """Joins everywhere but in the middle layer."""
    q, k = ix.project(shard)
    gathering = fabric.start_gather(ix.rotate(k))
    q = ix.rotate(q)
    return q, gathering.keys if _layer() == 1 else gathering.join()


def joins_a_layer_late(ix, shard, fabric):
    """Joins each gather when the next layer comes: at the chain's end all but one are joined, and none in time."""
    q, k = ix.project(shard)
    if _layer():
        _gatherings.pop().join()
    gathering = fabric.start_gather(ix.rotate(k))
    _gatherings[:] = [gathering]
    return ix.rotate(q), gathering.keys


def reuses_a_buffer_that_is_still_written(ix, shard, fabric):
    """All layers share one buffer, which a lane of the schedule's own still fills when the next layer reads it."""
    q, keys = overlap_rotate(ix, shard, fabric)
    shared = _shared.setdefault(keys.shape, torch.zeros_like(keys))

    def copy():
        time.sleep(0.002)
        shared.copy_(keys)

    copying = _copier.submit(copy)
    if _layer() != 1:
        copying.result()
    return q, shared


def sends_a_buffer_that_the_next_layer_overwrites(ix, shard, fabric):
    """The rotated keys lie in one buffer for all layers, and the middle layer returns before its gather has read it."""
    q, k = ix.project(shard)
    rotated = ix.rotate(k)
    local = _shared.setdefault(k.shape, torch.empty_like(k))
    local.copy_(rotated)
    gathering = fabric.start_gather(local)
    if _layer() == 1:
        local.zero_()
    return ix.rotate(q), gathering.join()


def starts_layers_early(ix, shard, fabric):
    """Computes a layer from the inputs of the layer before, as if it need not wait for them. By itself a layer has none before it."""
    before = _inputs[-1:]
    _inputs[:] = [(ix, shard)]
    is_next = bool(before) and before[0][0] is not ix and before[0][1].x_TX.shape == shard.x_TX.shape
    return overlap_rotate(ix, before[0][1] if is_next else shard, fabric)
