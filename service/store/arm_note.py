"""The note of an arm's run, of a curve and of a history: what was measured, and what to think of it, in plain words."""

from __future__ import annotations

from experiments.names import Device, FabricKind, Verdict
from service.judge.interval import Interval
from service.judge.results import ArmResult, CellResult, SweepResult
from service.report.table import bounds, percent, share, verdict_words
from service.store.curves import Curve
from service.store.history_runs import HistoryRun

THINK = {
    Verdict.FASTER: "The interval excludes 1: the arm is faster here.",
    Verdict.SLOWER: "The interval excludes 1: the arm is slower here.",
    Verdict.SAME: "No difference that matters: the 90 % interval lies inside the indifference band.",
    Verdict.UNRESOLVED: "Nothing can be said: the interval is too wide. More launches would narrow it.",
    Verdict.INVALID: "The arm computes something else: until that is mended its speed means nothing, so none is shown.",
}


def arm_note(result: SweepResult, cell: CellResult, arm: ArmResult, links: str) -> str:
    """Markdown, well below what MLflow keeps of a tag."""
    lines = [f"**{_headline(cell, arm)}**", links, *_effect(result, cell, arm), *_account(cell, arm), *_trust(result, cell, arm)]
    return "\n\n".join([*lines, f"Measured: {_setting(cell, arm)}."]) + "\n"


def _headline(cell: CellResult, arm: ArmResult) -> str:
    if arm.verdict is None:
        return f"{arm.arm} in {cell.label}: what the other arms are compared with"
    return f"{arm.arm} in {cell.label}: {verdict_words(arm)}"


def _effect(result: SweepResult, cell: CellResult, arm: ArmResult) -> list[str]:
    if cell.is_invalid:
        faults = [f"{fault.arm}: {fault.detail}" for fault in cell.faults[:3]]
        return [f"{THINK[Verdict.INVALID]} Found wrong: {'; '.join(faults)}."]
    if arm.comparison is None or arm.verdict is None:
        return [f"{arm.reason}."] if arm.reason else []
    c = arm.comparison
    less = 100 * (1 - c.ratio.estimate)
    words = f"{abs(less):.1f} % {'less' if less > 0 else 'more'} time than the baseline"
    return [
        f"{words}: time ratio {c.ratio.estimate:.3f} [{bounds(c.ratio)}] at {percent(result.confidence)} %, from {c.launches} launches and"
        f" {c.pairs} pairs. {THINK[arm.verdict]}{_size(arm)}"
        + (f" An effect of {c.detectable_pct:.1f} % would have been seen." if arm.verdict is Verdict.UNRESOLVED else "")
    ]


def _size(arm: ArmResult) -> str:
    if arm.is_small:
        return " By less than the indifference band: too small to act on."
    return " Perhaps by too little to act on: it is not clear of the indifference band." if arm.may_be_small else ""


def _account(cell: CellResult, arm: ArmResult) -> list[str]:
    a = arm.account
    if a is None or cell.is_invalid:
        return []
    hidden = f", {share(a.hidden)} of it hidden" if a.hidden is not None and arm.comparison is not None else ""
    words = f"The gather takes {_us(a.gather_us)} in the serial order; {_us(a.exposed_us)} of this arm's {_us(a.total_us)} wait for it{hidden}."
    if arm.comparison is None:
        return [words]
    return [
        f"{words} Saved: {_us(a.saved_us)} a layer; lost to contention: {_us(a.contention_us)}; tax of fork and join: {_us(a.fork_join_tax_us)}."
    ]


def _trust(result: SweepResult, cell: CellResult, arm: ArmResult) -> list[str]:
    doubts = []
    if cell.aa is not None and not cell.is_invalid:
        state = "looked DIFFERENT: do not trust this cell" if cell.label in result.aa.flagged else "looked equal"
        doubts.append(f"A/A: equal code {state} ({cell.aa.ratio.estimate:.3f} [{bounds(cell.aa.ratio)}])")
    kind, device = cell.cell["fabric"]["kind"], cell.cell["device"]
    if kind == FabricKind.EMULATED:
        doubts.append("the link is EMULATED: a stated model over the real gather, no real network of that speed")
    elif kind == FabricKind.ONE_RANK:
        doubts.append("ONE REAL RANK: its peers' keys come at a stated link's pace")
    if device == Device.SIMULATED:
        doubts.append("the device is SIMULATED: nothing was measured")
    elif device == Device.CPU:
        doubts.append("CPU ranks: says nothing about NCCL on GPUs")
    if arm.host_bound:
        doubts.append("the host set the pace")
    if cell.failure:
        doubts.append(f"given up: {cell.failure.splitlines()[0]}")
    return [f"To know before believing it: {'; '.join(doubts)}."] if doubts else []


def _setting(cell: CellResult, arm: ArmResult) -> str:
    c = cell.cell
    factors = ", ".join(f"{name} {value}" for name, (_, value) in arm.differs.items())
    cached = f" behind {c['prefix_tokens']:,} cached" if c["prefix_tokens"] else ""
    return (
        f"{c['new_tokens']:,} new tokens{cached} on {c['cp_size']} ranks, {c['split']}, {c['fabric_name']}, scope {c['scope']}, {c['regime']},"
        f" dims {c['dims_name']}, {c['device']}; {cell.launches} launches{f'; this arm: {factors}' if factors else ''}"
    )


def _us(interval: Interval) -> str:
    return f"{interval.estimate:,.0f} us"


def curve_note(curve: Curve, sweep_link: str) -> str:
    """A curve is no measurement of its own."""
    return f"**{curve.arm} over prompt lengths** ({curve.label}): the figures of its cells as one line. Steps are new tokens.\n\n{sweep_link}\n"


def history_note(run: HistoryRun, links: str) -> str:
    """What the lines of a history are."""
    count = max(len(steps) for steps in run.steps.values())
    return (
        f"**{run.name}**, {count} nights on one machine with one methodology.\n\n"
        f"`nights/ratio` is the published time ratio, `low` and `high` its 95 % interval by itself; `base_us` and `arm_us` are the times, `aa` the"
        f" ratio of equal code. The ratio moved: look at the code. Both times moved: at the machine. `aa` moved: at neither.\n\n{links}\n"
    )
