"""Location: how far a sample of noisy values is shifted against another that was taken in turn with it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

REACH = 5
"""Rows apart at most: a few neighbours average the noise of single trials out; further ones bring in what the machine changed meanwhile."""


def shift(
    baseline: Sequence[float] | NDArray[np.float64],
    other: Sequence[float] | NDArray[np.float64],
    blocks: Sequence[int] | NDArray[np.int_],
) -> float:
    """How far `other` lies above `baseline`: the median of the differences between their values of rows at most `REACH` apart.

    It is the two-sample estimate of Hodges and Lehmann (Ann. Math. Stat. 34, 1963), with near rows alone: row i against row j comes with row
    j against row i, so a drift or a step cancels, and never from one block to another. Noise of trials is skew: most are near the fastest, some are
    preempted. A difference of two such values is spread wider than either of them, so a rule that takes one difference a row has 1.2 to 2.2
    times the variance (on recorded trials: `experiments/METHODOLOGY.md`, section 4).

    Args:
        baseline, other: [rows], in the order in which they were measured.
        blocks: [rows], the block of each.

    Raises:
        ValueError: No rows, or the lengths differ.
    """
    if not len(baseline) or not len(baseline) == len(other) == len(blocks):
        raise ValueError(f"a shift needs rows of both, not {len(baseline)} and {len(other)} in blocks of {len(blocks)}")
    low, high, place = np.asarray(baseline, dtype=float), np.asarray(other, dtype=float), np.asarray(blocks)
    rows, near = len(low), []
    for apart in range(-min(REACH, rows - 1), min(REACH, rows - 1) + 1):
        early, late = slice(max(-apart, 0), rows - max(apart, 0)), slice(max(apart, 0), rows + min(apart, 0))
        near.append((high[late] - low[early])[place[late] == place[early]])
    return float(np.median(np.concatenate(near)))
