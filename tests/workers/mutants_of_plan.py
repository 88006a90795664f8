"""A mutant below the schedules: importing it makes this rank process plan as if it were the other rank."""

from __future__ import annotations

from workers import prepared_cell
from workers.schedules import serial
from workers.splits import plan


def _other_plan(split, step, cp_size, rank):
    from dataclasses import replace

    own, other = plan(split, step, cp_size, rank), plan(split, step, cp_size, (rank + 1) % cp_size)
    return replace(own, local_rows_T=other.local_rows_T, counts=own.counts[::-1], blocks=other.blocks)


prepared_cell.plan = _other_plan
swaps_plans = serial
