"""Where a sweep's numbers come from: who ran on which node, what launches cost, what was compared, how to have it again."""

from __future__ import annotations

import shlex
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from experiments.names import BASELINE_ARM, SweepStatus, Verdict
from service.judge.results import ArmResult, CellResult, SweepResult
from service.report.dossier import Dossier
from service.report.table import counted_verdicts, verdict_words


@dataclass(frozen=True)
class Placement:
    """A rank -> node map, and the launches that had it."""

    cp_size: int
    launches: tuple[int, ...]
    ranks: tuple[dict[str, Any], ...]


def placements(result: SweepResult) -> list[Placement]:
    """Every map that occurred; processes differ at every launch and do not count."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for launch in result.environment.get("launches", []):
        ranks = tuple(
            (r["rank"], r.get("hostname"), r.get("node_id"), r.get("address"), r.get("interface")) for r in launch["ranks"]
        )
        found[(launch["cp_size"], ranks)].append(launch)
    return [
        Placement(key[0], tuple(launch["launch"] for launch in launches), tuple(launches[0]["ranks"]))
        for key, launches in found.items()
    ]


@dataclass(frozen=True)
class LaunchRow:
    """One life of a rank group; `cells` were warmed up in it, `unsettled` of them timed all the same."""

    cp_size: int
    launch: int
    launch_s: float
    cells: int
    warmup_blocks: int
    unsettled: int


def launch_rows(dossier: Dossier) -> list[LaunchRow]:
    sizes = {cell.cell["cell_id"]: cell.cell["cp_size"] for cell in dossier.result.cells}
    rows = []
    for launch in dossier.result.environment.get("launches", []):
        own = [s for s in dossier.settlings if s["launch"] == launch["launch"] and sizes.get(s["cell_id"]) == launch["cp_size"]]
        unsettled = sum(not s["is_settled"] for s in own)
        blocks = sum(s["blocks"] for s in own)
        rows.append(LaunchRow(launch["cp_size"], launch["launch"], launch["launch_s"], len(own), blocks, unsettled))
    return rows


@dataclass(frozen=True)
class Finding:
    """What one arm came to in one place: the headline's line."""

    arm: str
    place: str
    """The fabric, and the regime where there are several."""
    words: str


def findings(result: SweepResult) -> list[Finding]:
    """The verdicts of each arm, fabrics and regimes apart: what an emulated link says is no word about a real one."""
    regimes = {cell.cell["regime"] for cell in result.cells}
    groups: dict[tuple[str, str], list[tuple[CellResult, ArmResult]]] = defaultdict(list)
    for cell in result.cells:
        for arm in cell.arms:
            if arm.arm != BASELINE_ARM:
                place = f"{cell.cell['fabric_name']}{', ' + cell.cell['regime'] if len(regimes) > 1 else ''}"
                groups[(arm.arm, place)].append((cell, arm))
    return [Finding(arm, place, "; ".join(_counted(pairs))) for (arm, place), pairs in groups.items()]


def _counted(pairs: Sequence[tuple[CellResult, ArmResult]]) -> list[str]:
    words = []
    for found in counted_verdicts(arm for _, arm in pairs):
        known = [a.comparison.ratio.estimate for _, a in pairs if a.comparison and verdict_words(a) == found.words]
        span = ""
        if found.verdict in (Verdict.FASTER, Verdict.SLOWER) and known:
            least, most = f"{min(known):.3f}", f"{max(known):.3f}"
            span = f" (time ratio {least})" if least == most else f" (time ratio {least} to {most})"
        words.append(f"{found.words} in {found.count} of {len(pairs)} cell{'s' * (len(pairs) != 1)}{span}")
    return words


def natures(result: SweepResult) -> list[str]:
    """What kind of numbers these are, where they are not plainly real: said beside the title."""
    total = len(result.cells)
    emulated = sum(cell.cell["fabric"]["kind"] == "emulated" for cell in result.cells)
    devices = {cell.cell["device"] for cell in result.cells}
    said = []
    if "simulated" in devices:
        said.append("SIMULATED: planted times, nothing was measured")
    if emulated:
        said.append(f"EMULATED link in {emulated} of {total} cells" if emulated < total else "EMULATED link")
    if "cpu" in devices:
        said.append("CPU ranks")
    if any(cell.shares_gpus for cell in result.cells):
        said.append("SHARED GPU: behaviour, not speed")
    return said


def differences(result: SweepResult) -> list[str]:
    """What each arm changes, once."""
    arms = {arm.arm: arm for cell in result.cells for arm in cell.arms}
    return [
        f"{arm.arm}: " + ", ".join(f"{factor} {ours} (baseline: {theirs})" for factor, (theirs, ours) in arm.differs.items())
        for arm in arms.values()
        if arm.differs
    ]


def when(utc: str) -> str:
    """An ISO time as people write it."""
    return utc.replace("T", " ").replace("+00:00", " UTC")


def command(result: SweepResult) -> str:
    """The command as it was typed, for a shell."""
    return shlex.join(str(word) for word in result.environment.get("command", []))


def progress(dossier: Dossier) -> str:
    """How far a sweep has come that has not finished; empty for one that has."""
    result, plan = dossier.result, dossier.spec.measurement
    if result.status is SweepStatus.FINISHED:
        return ""
    done = [cell.launches for cell in result.cells]
    several = f"{min(done)} to {max(done)}" if done and min(done) != max(done) else f"{max(done, default=0)}"
    planned = f"{plan.launches}" if plan.last_launches == plan.launches else f"{plan.launches} to {plan.last_launches}"
    missing = sum(not cell.is_measured and not cell.is_invalid for cell in result.cells)
    more = f"; {missing} of {len(done)} cells have no measurement yet" if missing else ""
    last = f"; the last block was recorded at {when(dossier.last_record_at)}" if dossier.last_record_at else ""
    return f"{several} of {planned} planned launches of a cell are in the records{more}{last}"
