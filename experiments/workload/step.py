"""One prefill step: what the ranks of a group process together."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sequence:
    """A request's part in a step: `prefix_tokens` already cached, `new_tokens` to extend."""

    prefix_tokens: int
    new_tokens: int


@dataclass(frozen=True, slots=True)
class Step:
    """The sequences of one step, in token order."""

    sequences: tuple[Sequence, ...]

    @property
    def new_tokens(self) -> int:
        """S: tokens that the step extends."""
        return sum(s.new_tokens for s in self.sequences)

    @property
    def kv_tokens(self) -> int:
        """Keys that the step's logits see: every sequence's prefix and new tokens, packed."""
        return sum(s.prefix_tokens + s.new_tokens for s in self.sequences)

    @property
    def logit_pairs(self) -> int:
        """(query, key) pairs under the causal mask."""
        return sum(s.new_tokens * s.prefix_tokens + s.new_tokens * (s.new_tokens + 1) // 2 for s in self.sequences)


Workload = tuple[Step, ...]
"""The steps of one cell, run in order."""
