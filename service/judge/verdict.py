"""Verdict words, exactly as `experiments/METHODOLOGY.md` defines them."""

from __future__ import annotations

from dataclasses import dataclass

from experiments.names import Verdict
from service.judge.comparison import Comparison
from service.judge.interval import Interval

CLEAR_SHARE = 0.2
"""Of the error: what a claim of more than the band may spend. Beside noise that is wide against the band, an interval that excludes 1 lies beyond it
nearly as often, so the band alone would let up to one in twenty of equal arms be FASTER or SLOWER; with this, one in a hundred."""


def is_clear(ratio: Interval, p_value: float, level: float, indifference_pct: float) -> bool:
    """Whether a ratio is clear of the band: its interval at 1 - `level` lies beyond, and equal times are refused at a fifth of that level. Without
    a band, whether the interval excludes 1."""
    beyond = ratio.beyond(1 - indifference_pct / 100, 1 + indifference_pct / 100)
    return beyond and (indifference_pct == 0 or p_value <= CLEAR_SHARE * level)


@dataclass(frozen=True)
class Judgement:
    """A verdict and what goes with it.

    Attributes:
        is_small: Told from 1, and inside the indifference band.
        may_be_small: Told from 1, and not clear of the band: whether it matters is open, or denied.
    """

    verdict: Verdict
    is_small: bool = False
    may_be_small: bool = False
    reason: str = ""

    @property
    def words(self) -> str:
        """FASTER and SLOWER alone are clear of the indifference band."""
        size = " (small)" if self.is_small else " (maybe small)" if self.may_be_small else ""
        return f"{self.verdict}{size}"


def judge(comparison: Comparison | None, indifference_pct: float) -> Judgement:
    """FASTER or SLOWER when the interval excludes 1 for the slowest and the fastest rank alike; SAME; else UNRESOLVED."""
    if comparison is None:
        return Judgement(Verdict.UNRESOLVED, reason="too few launches were measured")
    band = 1 - indifference_pct / 100, 1 + indifference_pct / 100
    slowest, fastest = comparison.ratio, comparison.ratio_min
    if slowest.excludes(1):
        is_faster = slowest.high < 1
        if not fastest.excludes(1) or (fastest.high < 1) != is_faster:
            return Judgement(Verdict.UNRESOLVED, reason="the fastest ranks do not bear the slowest ones' difference out")
        verdict = Verdict.FASTER if is_faster else Verdict.SLOWER
        clear = is_clear(slowest, comparison.p_value, 1 - comparison.confidence, indifference_pct)
        return Judgement(verdict, is_small=slowest.inside(*band), may_be_small=not clear)
    if comparison.ratio_90.inside(*band):
        return Judgement(Verdict.SAME)
    return Judgement(Verdict.UNRESOLVED, reason=f"the smallest effect to be seen was {comparison.detectable_pct:.2g} %")
