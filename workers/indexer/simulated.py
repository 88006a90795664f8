"""The indexer on meta tensors: every shape is real, and the one stage whose shapes depend on values is given its result's."""

from __future__ import annotations

import torch

from workers.indexer.indexer import Indexer, KeyCache, Shard


class SimulatedIndexer(Indexer):
    """See `Indexer`."""

    def _select(self, q8_THD: torch.Tensor, gates_TH: torch.Tensor, shard: Shard, cache: KeyCache) -> torch.Tensor:
        return torch.empty(q8_THD.shape[0], self.dims.topk, dtype=torch.int32, device="meta")

    def _quantise_and_store(self, k_SD: torch.Tensor, cache: KeyCache) -> None:
        """Nothing to store."""
