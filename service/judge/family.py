"""Families: what many comparisons at once do to an error rate, and the levels that repair it.

Differences (FASTER, SLOWER) and equalities (SAME) are two families of discoveries, each held to its false discovery rate by Benjamini and
Hochberg (J. R. Stat. Soc. B 57, 1995) on sequentially valid p-values. Their intervals are read at the level 1 - q R / m that goes with R discoveries
among m (false coverage-statement rate: Benjamini and Yekutieli, J. Am. Stat. Assoc. 100, 2005). A p-value is the smallest level at which an
interval excludes, so a discovery's interval excludes 1 and no other's does: headline and table cannot disagree.

A/A pairs are a family of their own that nothing may be found in: Holm's procedure (Scand. J. Stat. 6, 1979) flags a sweep at most once in twenty.
"""

from __future__ import annotations

from collections.abc import Sequence


def discovery_level(p_values: Sequence[float], rate: float) -> float:
    """The level alpha at which each comparison of a family is read: `rate` x max(1, R) / m, with R of Benjamini and Hochberg.

    A comparison is a discovery exactly when its p-value is at most that level.

    Raises:
        ValueError: No p-values.
    """
    if not p_values:
        raise ValueError("a family needs p-values")
    m = len(p_values)
    # The largest rank whose p-value lies under its line; scipy's and statsmodels' adjusted p-values say who is in, not the line itself.
    rejected = max((rank for rank, p in enumerate(sorted(p_values), 1) if p <= rate * rank / m), default=0)
    return rate * max(1, rejected) / m


def flagged(p_values: Sequence[float], rate: float) -> list[bool]:
    """Which nulls Holm's procedure rejects at the family-wise error `rate`; empty for an empty family."""
    if not p_values:
        return []
    from statsmodels.stats.multitest import multipletests  # 1 s to import

    return [bool(reject) for reject in multipletests(p_values, alpha=rate, method="holm")[0]]
