"""Trials with a planted truth, for tests of judgement."""

from __future__ import annotations

import random
from collections.abc import Mapping

from service.judge.samples import Trial


def trials(
    times_us: Mapping[str, float],
    *,
    launches: int = 5,
    blocks: int = 2,
    rows: int = 8,
    noise: float = 0.0,
    launch_noise: float = 0.0,
    drift: float = 0.0,
    seed: int = 0,
    ranks: int = 2,
    kind: str = "arms",
    steps: int = 1,
    enqueue_us: float | None = None,
) -> list[Trial]:
    """Trials of variants whose times are planted: one-sided noise a trial, an effect of the launch on each variant, a drift per row."""
    rng = random.Random(seed)
    out = []
    clock = 0
    for launch in range(launches):
        effect = {variant: rng.gauss(0, launch_noise) for variant in times_us}
        for block in range(blocks):
            for row in range(rows):
                clock += 1
                order = list(times_us)
                rng.shuffle(order)
                for step in range(steps):
                    for variant in order:
                        base = times_us[variant] * (1 + drift * clock) * (1 + effect[variant])
                        out.append(
                            Trial(
                                launch=launch,
                                block=block,
                                kind=kind,
                                row=row,
                                step=step,
                                variant=variant,
                                elapsed_us=tuple(base * (1 + abs(rng.gauss(0, noise))) for _ in range(ranks)),
                                window_us=(0.0,) * ranks,
                                gather_us=(None,) * ranks,
                                wire_us=(None,) * ranks,
                                late_us=(None,) * ranks,
                                skew_us=None,
                                enqueue_us=(enqueue_us,) * ranks,
                            )
                        )
    return out
