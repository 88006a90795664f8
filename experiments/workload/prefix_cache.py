"""A model of a serving engine's prefix cache: which of a prompt's tokens are already cached when it arrives.

A block id of a trace stands for the whole prompt up to and including its block, not for the block's own tokens alone, so the
same id means the same prefix. The cache still remembers which id each block followed, and an id elsewhere in a chain is no hit:
a trace whose ids name contents only would otherwise be credited with hits that no engine could have.

Only full blocks are reusable. A prompt's last block may be partial; its id is then neither looked up nor kept, as engines reuse
whole pages. Generated tokens are not cached: the trace has no ids for them, so hits on a conversation's replies are understated.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as Seq


class PrefixCache:
    """Least recently used blocks go first, and a block never before those that follow it in its chain."""

    def __init__(self, block_tokens: int, capacity_blocks: int | None = None) -> None:
        """An empty cache.

        Args:
            block_tokens: Tokens of a full block, at least 1.
            capacity_blocks: Blocks it holds; 0 caches nothing, None has no bound.

        Raises:
            ValueError: `block_tokens` is below 1 or `capacity_blocks` below 0.
        """
        if block_tokens < 1 or (capacity_blocks is not None and capacity_blocks < 0):
            raise ValueError(f"block_tokens must be >= 1 and capacity_blocks >= 0, not {block_tokens} and {capacity_blocks}")
        self.block_tokens = block_tokens
        self._capacity_blocks = capacity_blocks
        self._blocks: OrderedDict[int, int | None] = OrderedDict()
        """Block id -> the id before it in its chain; the least recently used first."""

    def __len__(self) -> int:
        """Blocks held."""
        return len(self._blocks)

    def __contains__(self, block_id: int) -> bool:
        return block_id in self._blocks

    def leading_blocks(self, block_ids: Seq[int]) -> int:
        """How many of the chain's leading blocks are cached, each after the one before it."""
        before: int | None = None
        for count, block_id in enumerate(block_ids):
            if block_id not in self._blocks or self._blocks[block_id] != before:
                return count
            before = block_id
        return len(block_ids)

    def hit_blocks(self, prompt_tokens: int, block_ids: Seq[int]) -> int:
        """How many leading blocks of the prompt are cached and may be reused.

        At least one token must be computed, or there would be no logits to sample from. As hits are whole blocks, a prompt that
        is cached to its last token computes its last block again (as engines with paged caches do).
        """
        reusable = (prompt_tokens - 1) // self.block_tokens
        return self.leading_blocks(block_ids[:reusable])

    def insert(self, prompt_tokens: int, block_ids: Seq[int]) -> None:
        """Keeps the prompt's full blocks, as its prefill leaves them, and marks them as just used."""
        chain = list(block_ids[: prompt_tokens // self.block_tokens])
        # From the end, so that the first block is the most recent: what is evicted is always the end of a chain, since a prefix
        # without its beginning can't be reused.
        for position in reversed(range(len(chain))):
            self._blocks[chain[position]] = chain[position - 1] if position else None
            self._blocks.move_to_end(chain[position])
        if self._capacity_blocks is not None:
            while len(self._blocks) > self._capacity_blocks:
                self._blocks.popitem(last=False)
