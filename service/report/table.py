"""The verdict table, for a terminal, a job's log and a Markdown note alike."""

from __future__ import annotations

import math
from collections import Counter

from experiments.names import Regime
from service.judge.interval import Interval
from service.judge.results import AACheck, ArmResult, CellResult, SweepResult

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
    return f"flagged in {len(aa.flagged)} of {aa.cells} cells" if aa.flagged else f"quiet in {aa.cells} cells"


def verdict_words(arm: ArmResult) -> str:
    if arm.verdict is None:
        return ""
    return f"{arm.verdict} (small)" if arm.is_small else str(arm.verdict)


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
    return f"{where}, {env['cores']} cores, {env['cpu']}; torch {versions['torch']}, ray {versions['ray']}; revision {env['revision'][:12]}"


def _planted(result: SweepResult) -> list[str]:
    """What was made slower, later or busier on purpose."""
    waits = {arm.arm: float(arm.factors.get("planted_wait_us", 0)) for cell in result.cells for arm in cell.arms}
    late, fillers = (sorted({float(cell.cell.get(name, 0)) for cell in result.cells} - {0}) for name in ("skew_us", "filler_us"))
    return [
        *(
            f"arm {arm}: slowed by a planted wait of {us:g} us a layer (arms.{arm}.planted_wait_us), which is none of its schedule"
            for arm, us in waits.items()
            if us
        ),
        *(f"skew {us:g} us: there the last rank starts every trial that late, in every arm (cells.skew_us)" for us in late),
        *(f"filler {us:g} us: there every layer's time includes that much work in place of attention and MoE" for us in fillers),
    ]


def _of_the_time(result: SweepResult) -> list[str]:
    """What a time is a time of."""
    lines = []
    if any(cell.cell["regime"] == Regime.STREAMING for cell in result.cells):
        layers = sorted({cell.cell["layers"] for cell in result.cells if cell.cell["regime"] == Regime.STREAMING})
        lines.append(f"streaming: times are of one layer, the mean of a chain of {', '.join(map(str, layers))} without a barrier")
    bound = [f"{arm.arm} in {cell.label}" for cell in result.cells for arm in cell.arms if arm.host_bound]
    if bound:
        lines.append(f"host bound: the device waited for the host's enqueuing ({'; '.join(bound)})")
    return lines


def _shared_cores(result: SweepResult) -> list[str]:
    """A line for every cp_size whose ranks outnumber the cores of a node."""
    crowded: dict[int, tuple[int, int]] = {}
    for launch in result.environment.get("launches", []):
        ranks = launch["ranks"]
        on_node = Counter(rank.get("node_id") for rank in ranks)
        for rank in ranks:
            if on_node[rank.get("node_id")] > rank.get("cores", math.inf):
                crowded[launch["cp_size"]] = on_node[rank.get("node_id")], rank["cores"]
    return [
        f"cp_size {size}: {ranks} ranks shared a node of {cores} cores: right for behaviour, wrong for speed"
        for size, (ranks, cores) in sorted(crowded.items())
    ]


def caveats(result: SweepResult) -> list[str]:
    """What a reader must know before believing a row."""
    lines = []
    emulated = sorted({cell.cell["fabric_name"] for cell in result.cells if cell.cell["fabric"]["kind"] == "emulated"})
    if emulated:
        lines.append(
            f"emulated links ({', '.join(emulated)}): a stated link model over the real gather, not a real network of that speed"
        )
    if any(cell.cell["device"] == "simulated" for cell in result.cells):
        lines.append("simulated device: planted stage times on a virtual clock; nothing was measured")
    if any(cell.cell["device"] == "cpu" for cell in result.cells):
        lines.append("CPU ranks: says nothing about NCCL on GPUs")
    lines += _shared_cores(result)
    if any(cell.cell["beyond_upstream"] for cell in result.cells):
        lines.append("several sequences under zigzag: beyond what upstream supports")
    lines += [*_of_the_time(result), *_planted(result)]
    if result.aa.flagged:
        lines.append(f"A/A FLAGGED, do not trust this sweep: equal code looked different in {', '.join(result.aa.flagged)}")
        lines += [f"A/A likely cause: {suspect}" for suspect in result.aa.suspects]
    unsettled = sum(cell.checks["unsettled_launches"] for cell in result.cells)
    if unsettled:
        lines.append(f"{unsettled} launches of a cell were timed before their trials had settled (measurement.max_warmup_blocks)")
    without = sum(cell.cell["steps_without_cp"] for cell in result.cells)
    if without:
        lines.append(f"{without} replayed steps were too short for their split and ran without CP in every arm")
    for cell in result.cells:
        if cell.faults:
            first = cell.faults[0]
            lines.append(f"INVALID {cell.label}: arm {first.arm}: {first.check}: {first.detail}")
        elif not cell.is_measured:
            lines.append(f"{cell.label}: not measured")
    if result.replay and result.replay["scale"] != 1:
        lines.append(f"every length of the trace was scaled by {result.replay['scale']:.4g} (workload.max_prompt_tokens)")
    if result.failure:
        lines.append(f"the sweep ended {result.status}: {result.failure.splitlines()[0]}")
    return lines
