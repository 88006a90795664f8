"""Live runs as people make them: one version in each launch, the versions in turn. A check on `rivals`, which reads recordings."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from experiments.errors import UserError
from experiments.names import BASELINE_ARM
from experiments.spec.experiment import ExperimentSpec
from service.calibrate.recording import OTHER_ARM
from service.calibrate.rivals import RIVALS, Said
from service.run.orders import block_of, warm_up_of
from service.run.rank_group import RankGroup
from workers.messages import BlockReport, PrepareCell

RUNS = 4
"""Of each version in a live comparison: as many as the rivals in turn take."""


class LiveComparison(BaseModel):
    """Samples of the slowest rank, us, of runs baseline, other, baseline, other, ..."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    machine: str
    seed: int
    planted_pct: float
    baseline_us: tuple[tuple[float, ...], ...]
    other_us: tuple[tuple[float, ...], ...]

    def verdicts(self) -> dict[str, Said]:
        """What each rival says of it."""
        return {
            rival.name: rival.says(self.baseline_us[: rival.runs], self.other_us[: rival.runs])
            for rival in RIVALS
            if rival.is_in_turn or rival.runs == 1
        }


def run_live(group: RankGroup, spec: ExperimentSpec, machine: str, planted_pct: float) -> LiveComparison:
    """One live comparison of a study's cell, without records: it measures rules, not arms."""
    runs: dict[str, list[tuple[float, ...]]] = {BASELINE_ARM: [], OTHER_ARM: []}
    for number in range(RUNS):
        for arm in (BASELINE_ARM, OTHER_ARM):
            runs[arm].append(_run(group, spec, arm, number))
    return LiveComparison(
        machine=machine,
        seed=spec.seed,
        planted_pct=planted_pct,
        baseline_us=tuple(runs[BASELINE_ARM]),
        other_us=tuple(runs[OTHER_ARM]),
    )


def _run(group: RankGroup, spec: ExperimentSpec, arm: str, number: int) -> tuple[float, ...]:
    plan = spec.measurement
    group.launch(plan.launch_timeout_s, plan.gather_timeout_s, spec.device, [])
    return times_of(group, spec, [arm], spec.seed + 7919 * number)[arm]


def times_of(group: RankGroup, spec: ExperimentSpec, arms: list[str], seed: int) -> dict[str, tuple[float, ...]]:
    """In a group that is up: prepared, warmed up, and one block of a study's cell. Of each arm the slowest rank's times in order, us."""
    plan, (cell,) = spec.measurement, spec.expand().cells
    group.ask(
        PrepareCell(cell, dict(spec.arms), spec.weights, seed, plan.inputs, spec.verify, spec.simulation), plan.block_timeout_s
    )
    group.ask(warm_up_of(arms, 2 * plan.warmup_trials, 1, seed, "warm up"), plan.block_timeout_s)
    block = block_of(arms, plan.trials_per_block, 1, seed)
    reports = [answer for answer in group.ask(block, plan.block_timeout_s) if isinstance(answer, BlockReport)]
    slowest_us = [max(row.elapsed_us for row in rows) for rows in zip(*(report.rows for report in reports), strict=True)]
    timed = list(zip(block.orders, slowest_us, strict=True))
    return {arm: tuple(us for order, us in timed if order.variant == arm) for arm in arms}


def read_live(path: Path) -> Iterator[LiveComparison]:
    """
    Raises:
        UserError: The file is not there, or a line is no live comparison.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--live: {str(path)!r} cannot be read: {getattr(error, 'strerror', None) or 'it is no text'}") from None
    for number, line in enumerate(lines, 1):
        try:
            yield LiveComparison.model_validate_json(line)
        except ValidationError as error:
            raise UserError(f"--live: {path}:{number} is no live comparison: {error.errors()[0]['msg']}") from None
