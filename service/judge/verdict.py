"""Verdict words, exactly as `experiments/METHODOLOGY.md` defines them."""

from __future__ import annotations

from dataclasses import dataclass

from experiments.names import Verdict
from service.judge.comparison import Comparison


@dataclass(frozen=True)
class Judgement:
    """A verdict and what goes with it. `is_small`: told from 1, and inside the indifference band."""

    verdict: Verdict
    is_small: bool = False
    reason: str = ""

    @property
    def words(self) -> str:
        return f"{self.verdict} (small)" if self.is_small else str(self.verdict)


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
        return Judgement(Verdict.FASTER if is_faster else Verdict.SLOWER, is_small=slowest.inside(*band))
    if comparison.ratio_90.inside(*band):
        return Judgement(Verdict.SAME)
    return Judgement(Verdict.UNRESOLVED, reason=f"the smallest effect to be seen was {comparison.detectable_pct:.2g} %")
