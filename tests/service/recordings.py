"""Recordings of a study that never ran: launches with a level and a noise of their own, and what was planted."""

from __future__ import annotations

import math
import random

from experiments.names import Verdict
from service.calibrate.recording import LaunchSamples, Recording


def make_launch(
    rng: random.Random, other: float = 1.0, level: float = 1.0, noise: float = 0.02, pairs: int = 12
) -> LaunchSamples:
    def times(factor: float) -> tuple[float, ...]:
        return tuple(1000 * level * factor * math.exp(rng.gauss(0, noise)) for _ in range(pairs))

    return LaunchSamples(
        baseline_us=times(1), other_us=times(other), baseline_min_us=times(0.99), other_min_us=times(0.99 * other)
    )


def make_recording(
    seed: int, planted_pct: float = 0.0, launches: int = 8, verdict: Verdict | None = None, **changes
) -> Recording:
    rng = random.Random(seed)
    made = tuple(make_launch(rng, 1 + planted_pct / 100, math.exp(rng.gauss(0, 0.1))) for _ in range(launches))
    values = {
        "kind": "power" if planted_pct else "aa",
        "machine": "m",
        "sweep_id": f"s{seed}",
        "seed": seed,
        "planted_pct": planted_pct,
        "planted_wait_us": 10 * planted_pct,
        "pilot_us": 1000.0,
        "loaded": False,
        "first_launches": 5,
        "max_launches": 8,
        "launches": made,
        "inside_s": 5.0,
        "starting_s": 0.5,
        "verdict": verdict or (Verdict.SLOWER if planted_pct else Verdict.UNRESOLVED),
        "is_small": False,
        "ratio": (1.0, 0.98, 1.02) if not planted_pct else (1.05, 1.03, 1.07),
        "detectable_pct": 1.5,
    }
    return Recording.model_validate(values | changes)
