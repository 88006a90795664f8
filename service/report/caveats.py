"""What a reader must know before believing a row: lines below the table."""

from __future__ import annotations

import math
from collections import Counter

from experiments.names import Regime, Verdict
from service.judge.results import SweepResult, shared_gpus


def caveats(result: SweepResult) -> list[str]:
    """Every line, the least surprising first."""
    return [
        *_of_the_links(result),
        *_shared_cores(result),
        *_shared_gpus(result),
        *_beyond_upstream(result),
        *_of_the_time(result),
        *_planted(result),
        *_gpus(result),
        *_disputed(result),
        *_doubts(result),
        *_gaps(result),
    ]


def _of_the_links(result: SweepResult) -> list[str]:
    """What was no real device or link."""
    lines = []
    emulated = sorted({cell.cell["fabric_name"] for cell in result.cells if cell.cell["fabric"]["kind"] == "emulated"})
    if emulated:
        lines.append(
            f"emulated links ({', '.join(emulated)}): a stated link model over the real gather, not a real network of that speed"
        )
    if any(cell.cell["device"] == "simulated" for cell in result.cells):
        lines.append("simulated device: planted stage times on a virtual clock; nothing was measured")
    played = sorted({cell.cell["fabric_name"] for cell in result.cells if cell.cell["fabric"]["kind"] == "one_rank"})
    if played:
        lines.append(
            f"one real rank ({', '.join(played)}): its peers' keys come at a stated link's pace and are never late; skew is not in it"
        )
    if any(cell.cell["device"] == "cpu" for cell in result.cells):
        lines.append("CPU ranks: says nothing about NCCL on GPUs")
    return lines


def _beyond_upstream(result: SweepResult) -> list[str]:
    if any(cell.cell["beyond_upstream"] for cell in result.cells):
        return ["several sequences under zigzag: beyond what upstream supports"]
    return []


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
    bound: dict[str, list[str]] = {}
    for cell in result.cells:
        for arm in cell.arms:
            if arm.host_bound:
                bound.setdefault(cell.label, []).append(arm.arm)
    lines += [
        f"host bound in {label}: {', '.join(arms)}: enqueuing takes as long as the work, so only a host that is ahead, as here, keeps the GPU busy"
        for label, arms in bound.items()
    ]
    return lines


def _gpus(result: SweepResult) -> list[str]:
    """How the GPUs behaved."""
    conduct = [cell.gpus for cell in result.cells if cell.gpus is not None]
    if not conduct:
        return []
    clocks = [mhz for gpus in conduct if gpus.sm_mhz is not None for mhz in gpus.sm_mhz]
    lines = [
        f"GPU clocks: {min(clocks)} to {max(clocks)} MHz" if clocks else "GPU clocks: unknown (nvidia-ml-py is not installed)"
    ]
    slowdowns: Counter[str] = Counter()
    for gpus in conduct:
        slowdowns.update(gpus.slowdowns)
    blocks = sum(gpus.blocks for gpus in conduct)
    lines += [f"GPU slowed down by {name} after {seen} of {blocks} blocks" for name, seen in sorted(slowdowns.items())]
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


def _shared_gpus(result: SweepResult) -> list[str]:
    """A line for every cp_size whose ranks outnumbered their GPUs."""
    launches = result.environment.get("launches", [])
    crowded = {launch["cp_size"]: gpus for launch in launches if (gpus := shared_gpus(launch["ranks"]))}
    return [
        f"SHARED GPU, cp_size {size}: {len(uuids)} ranks on {len(set(uuids))} GPU{'s' * (len(set(uuids)) != 1)}: right for behaviour; "
        "its times are nobody's speed, and are withheld"
        for size, uuids in sorted(crowded.items())
    ]


def _disputed(result: SweepResult) -> list[str]:
    """Intervals that exclude 1 beside UNRESOLVED."""
    disputed = Counter(
        (arm.arm, arm.reason)
        for cell in result.cells
        for arm in cell.arms
        if arm.verdict is Verdict.UNRESOLVED and arm.comparison is not None and arm.comparison.ratio.excludes(1)
    )
    return [
        f"{arm} in {count} cell{'s' * (count != 1)}: UNRESOLVED though the interval excludes 1: {reason}"
        for (arm, reason), count in disputed.items()
    ]


def _doubts(result: SweepResult) -> list[str]:
    """What the numbers themselves say against them."""
    lines = []
    if result.aa.flagged:
        lines.append(f"A/A FLAGGED, do not trust this sweep: equal code looked different in {', '.join(result.aa.flagged)}")
        lines += [f"A/A likely cause: {suspect}" for suspect in result.aa.suspects]
    unsettled = sum(cell.checks["unsettled_launches"] for cell in result.cells)
    if unsettled:
        lines.append(f"timed before their trials had settled: {unsettled} of the cells' launches (measurement.max_warmup_blocks)")
    return lines


def _gaps(result: SweepResult) -> list[str]:
    """What is missing or changed."""
    lines = []
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
