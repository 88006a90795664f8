"""The verdict table, for a terminal, a job's log and a Markdown note alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from experiments.names import Verdict
from service.judge.interval import Interval
from service.judge.results import AACheck, ArmResult, CellResult, SweepResult
from service.judge.verdict import Judgement

HEADINGS = ("cell", "arm", "verdict", "time ratio", "95 %", "p50 ms", "tokens/s", "saved us", "hidden", "ideal")


def headings(confidence: float) -> tuple[str, ...]:
    """The columns; the interval's says its confidence."""
    return tuple(f"{percent(confidence)} % interval" if heading == "95 %" else heading for heading in HEADINGS)


def percent(confidence: float) -> str:
    """A confidence in per cent, to a hundredth: corrected levels are odd numbers."""
    return f"{100 * confidence:.2f}".rstrip("0").rstrip(".")


def rows(result: SweepResult) -> list[tuple[str, ...]]:
    """One row for each (cell, arm), as text."""
    return [_row(cell, arm) for cell in result.cells for arm in cell.arms]


def _row(cell: CellResult, arm: ArmResult) -> tuple[str, ...]:
    ratio = arm.comparison.ratio if arm.comparison and not cell.faults else None
    account = arm.account
    return (
        cell.label,
        arm.arm,
        verdict_words(arm),
        f"{ratio.estimate:.3f}" if ratio else "",
        bounds(ratio) if ratio else "",
        f"{arm.latency.p50_us / 1e3:.2f}" if arm.latency else "",
        f"{arm.tokens_per_s:,.0f}" if arm.tokens_per_s else "",
        f"{account.saved_us.estimate:,.0f}" if account and arm.comparison else "",
        share(account.hidden) if account and arm.comparison else "",
        f"{100 * account.hidden_ideal.estimate:.0f} %" if account and account.hidden_ideal and arm.comparison else "",
    )


def aa_words(aa: AACheck) -> str:
    """What the A/A check says, in a word or two."""
    if not aa.cells:
        return "not run"
    cells = count_cells(aa.cells)
    return f"flagged in {len(aa.flagged)} of {cells}" if aa.flagged else f"quiet in {cells}"


def count_cells(count: int) -> str:
    return f"{count} cell" if count == 1 else f"{count} cells"


def verdict_words(arm: ArmResult) -> str:
    if arm.verdict is None:
        return ""
    return Judgement(arm.verdict, arm.is_small, arm.may_be_small).words


@dataclass(frozen=True)
class Counted:
    """How many arms have a verdict of those words; the plain verdict is the first of its words."""

    verdict: Verdict
    words: str
    count: int


def counted_verdicts(arms: Iterable[ArmResult]) -> list[Counted]:
    """What came out, in the order of verdicts; a headline qualifies a claim as its row does."""
    counts = Counter((arm.verdict, verdict_words(arm)) for arm in arms if arm.verdict is not None)
    order = list(Verdict)
    found = [Counted(verdict, words, count) for (verdict, words), count in counts.items()]
    return sorted(found, key=lambda c: (order.index(c.verdict), len(c.words)))


def counted_words(arms: Iterable[ArmResult]) -> str:
    """In a line; empty where nothing was compared."""
    return ", ".join(f"{c.count} {c.words}" for c in counted_verdicts(arms))


def bounds(interval: Interval) -> str:
    return f"{interval.low:.3f} to {interval.high:.3f}"


def share(hidden: Interval | None) -> str:
    """A share of G with its interval, never clipped; blank where G is lost in noise."""
    if hidden is None:
        return ""
    return f"{100 * hidden.estimate:.0f} % [{100 * hidden.low:.0f}, {100 * hidden.high:.0f}]"


def hardware(result: SweepResult) -> str:
    """On what it was measured, in one line."""
    env = result.environment
    nodes = {rank["hostname"] for launch in env.get("launches", []) for rank in launch["ranks"]}
    versions = env["versions"]
    where = f"{len(nodes)} host{'s' * (len(nodes) != 1)}" if nodes else "no host"
    ranks = [rank for launch in env.get("launches", [])[:1] for rank in launch["ranks"] if rank.get("gpu")]
    # By UUID: ranks may share one. Older records have none.
    gpus = Counter({rank.get("gpu_uuid") or rank["rank"]: rank["gpu"] for rank in ranks}.values())
    with_gpus = "".join(f"{count} x {name}, " if count > 1 else f"{name}, " for name, count in gpus.items())
    return (
        f"{where}, {with_gpus}{env['cores']} cores, {env['cpu']}; torch {versions['torch']}, ray {versions['ray']}; "
        f"revision {env['revision'][:12]}"
    )
