"""Suspects: why equal code may have looked different in a sweep. Named from what was noted before it began, and from its own baseline times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

from experiments.names import BASELINE_ARM
from service.judge.results import CellRecord
from service.judge.samples import by_launch, reduce_trials

DRIFT_SHARE = 0.05
"""Change of the baseline from the first launch to the last, along a straight line, that is worth naming."""
JUMP_SHARE = 0.2
"""Distance of the slowest launch's baseline from the fastest one's that is worth naming."""
NO_SUSPECT = "no cause was seen: nobody else computed when the sweep began, and the baseline's times neither drifted nor jumped"


def suspects(preflight: Sequence[Mapping[str, str]], flagged: Sequence[CellRecord]) -> tuple[str, ...]:
    """The likely causes, the likeliest first.

    Args:
        preflight: Findings on neighbours and clock, noted before the sweep: level, subject, text.
        flagged: The cells where A/A was flagged.
    """
    noted = [f"{finding['subject']}: {finding['text']}" for finding in preflight if finding["level"] != "ok"]
    seen = [line for record in flagged for line in _seen_in(record)]
    return tuple(noted + seen) or (NO_SUSPECT,)


def _seen_in(record: CellRecord) -> list[str]:
    samples = by_launch(s for s in reduce_trials(record.trials) if s.kind == "arms" and s.variant == BASELINE_ARM)
    times_ms = [median(s.max_us for s in launch) / 1e3 for launch in samples.values()]
    label, lines = record.cell["label"], []
    if record.checks.get("unsettled_launches"):
        lines.append(f"trend: {record.checks['unsettled_launches']} launches of {label} were timed before they had settled")
    if len(times_ms) < 3:
        return lines
    drift = _drift(times_ms)
    if abs(drift) > DRIFT_SHARE:
        lines.append(f"drift: the baseline of {label} went {'up' if drift > 0 else 'down'} by {abs(drift):.0%} over the launches")
    elif max(times_ms) > (1 + JUMP_SHARE) * min(times_ms):
        lines.append(
            f"clock or neighbours: the baseline of {label} took {min(times_ms):.2f} ms in one launch and {max(times_ms):.2f} ms in another"
        )
    return lines


def _drift(times: Sequence[float]) -> float:
    """Rise of the straight line of least squares over the launches, as a share of the mean."""
    from statistics import linear_regression

    slope, _ = linear_regression(range(len(times)), times)
    return slope * (len(times) - 1) / (sum(times) / len(times))
