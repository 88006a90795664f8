"""Mutants below the schedules: asking this module for one breaks the whole rank process that way, and gives `serial` to run on it.

Only ranks may ask: a test names them as `tests.workers.mutants_of_ranks:NAME` in an arm.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from workers import prepared_step
from workers.indexer import ops
from workers.indexer.rope import apply_rope
from workers.schedules import ScheduleFunction, serial
from workers.splits import plan
from workers.splits.plan import causal_ranges


def _plan_of_another_rank() -> None:
    def other(split, step, cp_size, rank):
        own, next_one = plan(split, step, cp_size, rank), plan(split, step, cp_size, (rank + 1) % cp_size)
        return replace(own, local_rows_T=next_one.local_rows_T, counts=own.counts[::-1], blocks=next_one.blocks)

    prepared_step.plan = other


def _ke(by: int) -> Callable[[], None]:
    def mutate() -> None:
        def shifted(step):
            ranges = causal_ranges(step)
            return replace(ranges, ke_S=ranges.ke_S + by)

        prepared_step.causal_ranges = shifted

    return mutate


def _interleaved_rope() -> None:
    def wrong(x, cos_TF, sin_TF, dims):
        return apply_rope(x, cos_TF, sin_TF, dims.model_copy(update={"rope_style": "interleaved"}))

    ops.apply_rope = wrong
    ops.TorchOps.rope_one = staticmethod(wrong)


MUTATIONS: dict[str, Callable[[], None]] = {
    "plan_of_another_rank": _plan_of_another_rank,
    "ke_one_early": _ke(-1),
    "ke_one_late": _ke(1),
    "interleaved_rope": _interleaved_rope,
}


def __getattr__(name: str) -> ScheduleFunction:
    if name not in MUTATIONS:
        raise AttributeError(name)
    MUTATIONS[name]()
    return serial
