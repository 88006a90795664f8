"""The order of trials in a block: a Williams design, relabelled at random.

In a Williams design every variant takes each position and follows every other equally often, so neither drift nor what one
trial leaves behind (caches, clocks, socket buffers) can favour a variant (E. J. Williams, Aust. J. Sci. Res. 2, 1949).
"""

from __future__ import annotations

import random
from collections.abc import Sequence as Seq


def williams_rows(count: int) -> list[list[int]]:
    """The rows of a Williams design for `count` treatments: `count` rows when even, twice as many when odd.

    Raises:
        ValueError: `count` is below 1.
    """
    if count < 1:
        raise ValueError(f"a Williams design needs at least one treatment, not {count}")
    first = [0]
    low, high = 1, count - 1
    while low <= high:
        first.append(low)
        if low != high:
            first.append(high)
        low, high = low + 1, high - 1
    rows = [[(value + shift) % count for value in first] for shift in range(count)]
    return rows if count % 2 == 0 else rows + [row[::-1] for row in rows]


def block_rows(variants: Seq[str], trials: int, seed: int) -> list[list[str]]:
    """At least `trials` trials of each variant, as rows that hold every variant once.

    Whole designs only, so that the block is balanced; each design gets its own random labels and row order from `seed`.

    Raises:
        ValueError: No variants, or one of them twice.
    """
    if not variants or len(set(variants)) != len(variants):
        raise ValueError(f"a block needs distinct variants, not {list(variants)}")
    rng = random.Random(seed)
    rows: list[list[str]] = []
    while len(rows) < trials:
        labels = list(variants)
        rng.shuffle(labels)
        design = williams_rows(len(variants))
        rng.shuffle(design)
        rows += [[labels[i] for i in row] for row in design]
    return rows


def rows_per_block(num_variants: int, trials: int) -> int:
    """How many trials of each variant `block_rows` really gives."""
    design = num_variants if num_variants % 2 == 0 else 2 * num_variants
    return -(-trials // design) * design
