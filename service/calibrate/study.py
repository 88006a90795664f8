"""A study: one small cell, compared again and again in launches of its own, each comparison judged as any sweep is.

Every comparison is a sweep in the records: planned, checked, timed and stopped by the same code as a user's.
"""

from __future__ import annotations

import contextlib
import math
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from experiments import catalogue
from experiments.errors import SpecError
from experiments.names import BASELINE_ARM
from experiments.spec.experiment import ExperimentSpec
from service.calibrate.recording import OTHER_ARM, LaunchSamples, Recording
from service.errors import InfrastructureError
from service.judge.judging import regime_of
from service.judge.results import CellRecord, SweepResult
from service.judge.samples import Sample, by_launch, reduce_trials
from service.run.controller import Action, Observer
from service.run.rank_group import RankGroup
from service.run.sweep import measure
from service.store.judged import load_result
from service.store.records import Records

CELL = (
    "name=calibrate",
    "suite=calibrate",
    "about=Equal arms, or one with a planted wait, again and again",
    "dims={name: calibrate, hidden: 256, q_lora_rank: 128, num_heads: 16, topk: 16, num_layers: 1}",
    "cells.fabric=process_group",
    "cells.split=zigzag",
    "workload.new_tokens=256",
    "verify.delay_ms=2",
    "verify.rows_per_rank=4",
    "measurement.aa=false",
    "measurement.launches=5",
    "measurement.max_launches=8",
    "measurement.blocks=1",
    "measurement.trials_per_block=50",
    "measurement.control_trials=2",
    "measurement.warmup_trials=4",
)
"""Small enough for a comparison to take about 5 s inside its launches on two cores: many comparisons matter here, not what is in the cell."""

AIM_S, MOST_S = 1.0, 1.5
"""Inside one launch of a study: what its cell is sized for, and what is too much."""
FEWEST_TOKENS = 32

POWER_PLAN = ("measurement.launches=8", "measurement.max_launches=20", "measurement.time_budget_s=30")
"""How long a planted slow-down is looked for."""


@dataclass(frozen=True)
class Plan:
    """One comparison to be made."""

    kind: Literal["aa", "power"]
    seed: int
    planted_pct: float = 0.0
    is_loaded: bool = False


def study_spec(overrides: Sequence[str], seed: int, wait_us: float) -> ExperimentSpec:
    """The spec of one comparison: the study's cell, the user's overrides, two arms.

    Raises:
        SpecError: An override that cannot be.
    """
    if taken := [change for change in overrides if change.split("=")[0].split(".")[0] in ("arms", "seed")]:
        raise SpecError(f"--set {taken[0]}: a study sets its own arms and seeds; see --planted-pct and --seed")
    spec = catalogue.load("quickstart", study_changes(overrides, seed, wait_us))
    if (cells := len(spec.expand().cells)) != 1:
        raise SpecError(
            f"--set: a study has one cell, and these overrides make {cells}: give one value for each of cells.* and workload.*"
        )
    return spec


def study_changes(overrides: Sequence[str], seed: int, wait_us: float) -> list[str]:
    """What makes a comparison's spec of quickstart: KEY=VALUE, the user's overrides among them."""
    arms = f"arms={{{BASELINE_ARM}: {{schedule: serial}}, {OTHER_ARM}: {{schedule: serial, planted_wait_us: {wait_us!r}}}}}"
    return [*CELL, *overrides, f"seed={seed}", arms]


def smaller_cell(new_tokens: int, launch_s: float) -> int | None:
    """New tokens of a study's cell for a machine that takes that long inside one of its launches: a power of two; None where its size will do."""
    if launch_s <= MOST_S or new_tokens <= FEWEST_TOKENS:
        return None
    return max(FEWEST_TOKENS, 1 << math.floor(math.log2(new_tokens * AIM_S / launch_s)))


class LastingGroup(RankGroup):
    """Owners that outlive a sweep: its controller ends the rank processes only. A study pays for actors once."""

    def close(self) -> None:
        self.kill_ranks()


@contextlib.contextmanager
def lasting(group: RankGroup) -> Iterator[RankGroup]:
    """A group for many sweeps in a row, ended for good on leaving."""
    try:
        yield LastingGroup(group.handles)
    finally:
        group.close()


class Study:
    """Makes comparisons on a group, into records."""

    def __init__(self, records: Records, group: RankGroup, overrides: Sequence[str]) -> None:
        self._records, self._group, self._overrides = records, group, list(overrides)
        self._pilot_us: float | None = None

    def pilot_us(self) -> float:
        """The baseline's time, from a short comparison of equal arms; what planted waits are sized by."""
        if self._pilot_us is None:
            spec = study_spec([*self._overrides, "measurement.launches=5", "measurement.max_launches=5"], 0, 0.0)
            record, _ = self._measure(spec)
            self._pilot_us = median(
                s.max_us for s in reduce_trials(record.trials, regime_of(record)) if s.variant == BASELINE_ARM
            )
        return self._pilot_us

    def compare(self, plan: Plan) -> Recording:
        """One comparison, to the rule's own stop.

        Raises:
            InfrastructureError: The ranks were lost, or the cell was found wrong: no comparison then.
        """
        pilot_us = self.pilot_us() if plan.planted_pct else 0.0
        wait_us = round(pilot_us * plan.planted_pct / 100, 3)
        spec = study_spec(self._overrides, plan.seed, wait_us)
        record, result = self._measure(spec)
        arm = next(arm for arm in result.cells[0].arms if arm.arm == OTHER_ARM)
        if arm.comparison is None or arm.verdict is None:
            raise InfrastructureError(f"sweep {result.sweep_id}: {result.failure or arm.reason or 'nothing was compared'}")
        spent = self._records.spent(result.sweep_id)
        ratio = arm.comparison.ratio
        return Recording(
            kind=plan.kind,
            machine=platform.node(),
            sweep_id=result.sweep_id,
            seed=plan.seed,
            planted_pct=plan.planted_pct,
            planted_wait_us=wait_us,
            pilot_us=pilot_us,
            loaded=plan.is_loaded,
            first_launches=spec.measurement.launches,
            max_launches=spec.measurement.last_launches,
            launches=launches_of(record),
            inside_s=sum(took_s for action, took_s in spent if action not in (Action.LAUNCH, Action.CLOSE)),
            starting_s=sum(took_s for action, took_s in spent if action == Action.LAUNCH),
            verdict=arm.verdict,
            is_small=arm.is_small,
            may_be_small=arm.may_be_small,
            ratio=(ratio.estimate, ratio.low, ratio.high),
            detectable_pct=arm.comparison.detectable_pct,
        )

    def _measure(self, spec: ExperimentSpec) -> tuple[CellRecord, SweepResult]:
        expansion = spec.expand()
        sweep_id = measure(
            spec,
            expansion,
            self._records,
            make_group=lambda cp_size: self._group,
            say=lambda line: None,
            extra_environment={},
            import_paths=[],
            watch=lambda tasks: contextlib.nullcontext(Observer()),
        )
        return self._records.cell(sweep_id, expansion.cells[0].cell_id), load_result(self._records, sweep_id)


def launches_of(record: CellRecord) -> tuple[LaunchSamples, ...]:
    """The pairs of each launch, in the order of blocks and rows."""
    found = []
    for samples in by_launch(s for s in reduce_trials(record.trials, regime_of(record)) if s.kind == "arms").values():
        rows: dict[tuple[int, int], dict[str, Sample]] = {}
        for sample in samples:
            rows.setdefault((sample.block, sample.row), {})[sample.variant] = sample
        pairs = [(row[BASELINE_ARM], row[OTHER_ARM]) for _, row in sorted(rows.items()) if len(row) == 2]
        blocks = tuple(base.block for base, _ in pairs)
        found.append(
            LaunchSamples(
                baseline_us=tuple(base.max_us for base, _ in pairs),
                other_us=tuple(other.max_us for _, other in pairs),
                baseline_min_us=tuple(base.min_us for base, _ in pairs),
                other_min_us=tuple(other.min_us for _, other in pairs),
                block=blocks if len(set(blocks)) > 1 else (),
            )
        )
    return tuple(found)
