"""The key caches of a prepared cell: one for each step and layer, made when it is first wanted."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from experiments.spec.cell import Cell
from workers.fabrics.exchange import POISON_BYTE
from workers.indexer.indexer import Indexer, KeyCache
from workers.indexer.rope import RotaryTable
from workers.inputs import InputPool
from workers.prepared_step import PreparedStep


class KeyCaches:
    """See the module. Prefixes are filled in by the baseline's stages."""

    def __init__(
        self,
        cell: Cell,
        steps: Sequence[PreparedStep],
        pool: InputPool,
        rope: RotaryTable,
        layers: Sequence[Indexer],
        device: torch.device,
    ) -> None:
        """`layers`: the baseline's. On a meta device no cache has values."""
        self._cell, self._steps, self._pool, self._rope, self._layers, self._device = cell, steps, pool, rope, layers, device
        self._caches: dict[tuple[int, int], KeyCache] = {}

    def stored(self, step: int, layer: int) -> KeyCache:
        """As the last run left it."""
        return self._caches[step, layer]

    def poisoned(self, step: int, layer: int) -> KeyCache:
        """Its prefixes filled in, the step's own rows poisoned."""
        if (step, layer) not in self._caches:
            self._caches[step, layer] = self._new(step, self._layers[layer])
        cache = self._caches[step, layer]
        if self._device.type != "meta":
            cache.values_ND.view(torch.uint8)[cache.new_rows_S] = POISON_BYTE
            cache.scale_N[cache.new_rows_S] = float("nan")
        return cache

    def _new(self, step: int, layer: Indexer) -> KeyCache:
        kv_tokens, head_dim = self._cell.steps[step].kv_tokens, self._cell.dims.head_dim
        values_ND = torch.zeros(kv_tokens, head_dim, dtype=torch.uint8, device=self._device).view(torch.float8_e4m3fn)
        cache = KeyCache(values_ND, torch.zeros(kv_tokens, device=self._device), self._steps[step].new_rows_S)
        if self._device.type != "meta":
            self._fill_prefix(step, cache, layer)
        return cache

    def _fill_prefix(self, step: int, cache: KeyCache, layer: Indexer) -> None:
        rows, start = self._steps[step].ranges.prefix_rows.to(self._device), 0
        ops, w = layer.ops, layer.weights
        for positions, x in self._pool.prefix_chunks(self._cell.steps[step]):
            k = ops.norm_k(ops.project(x, w.wk), w.k_norm_weight, w.k_norm_bias)
            cos, sin = (table.to(self._device) for table in self._rope.cos_sin(positions))
            k = ops.hadamard(ops.rope_one(k, cos, sin, self._cell.dims))
            ops.store_keys(k, cache.values_ND, cache.scale_N, rows[start : start + len(positions)])
            start += len(positions)
