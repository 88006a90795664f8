"""A recording: one comparison of a calibration study, with every pair of its samples, as one line of a JSON file.

The file outlives the run that made it: rules are read again over the same samples (`error_rates`, `rivals`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from statistics import fmean, median
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from experiments.errors import UserError
from experiments.names import BASELINE_ARM, Verdict
from service.judge.comparison import Evidence
from service.judge.interval import Interval
from service.judge.location import shift
from service.judge.looks import Looks
from service.judge.verdict import Judgement

OTHER_ARM = "other"
"""The arm of a study beside the baseline: equal to it, or slower by a planted wait."""


class LaunchSamples(BaseModel):
    """Pairs of one launch in the order of its rows, us: times of the slowest rank and of the fastest; their blocks, left out where there was one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    baseline_us: tuple[float, ...]
    other_us: tuple[float, ...]
    baseline_min_us: tuple[float, ...]
    other_min_us: tuple[float, ...]
    block: tuple[int, ...] = ()

    def first(self, pairs: int) -> LaunchSamples:
        """As it would have been with so many pairs."""
        return LaunchSamples(
            baseline_us=self.baseline_us[:pairs],
            other_us=self.other_us[:pairs],
            baseline_min_us=self.baseline_min_us[:pairs],
            other_min_us=self.other_min_us[:pairs],
            block=self.block[:pairs],
        )

    @cached_property
    def log_ratio(self) -> float:
        return self._log_ratio(self.baseline_us, self.other_us)

    @cached_property
    def log_ratio_min(self) -> float:
        return self._log_ratio(self.baseline_min_us, self.other_min_us)

    def _log_ratio(self, baseline_us: Sequence[float], other_us: Sequence[float]) -> float:
        return shift(np.log(baseline_us), np.log(other_us), self.block or [0] * len(baseline_us))


class Recording(BaseModel):
    """See the module.

    Attributes:
        planted_pct: What the other arm was slowed down by, per cent of `pilot_us`; 0 in an A/A comparison.
        planted_wait_us: The same as it was planted.
        pilot_us: The baseline's time that the wait was sized by.
        loaded: Whether a neighbour computed in bursts.
        first_launches, max_launches: The planned looks.
        launches: What was measured until the rule stopped.
        inside_s: Wall time of everything that launches do, starting rank processes apart.
        starting_s: Wall time of starting them.
        verdict, ratio, detectable_pct: What the service said when it stopped.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["aa", "power"]
    machine: str
    sweep_id: str
    seed: int
    planted_pct: float
    planted_wait_us: float
    pilot_us: float
    loaded: bool
    first_launches: int
    max_launches: int
    launches: tuple[LaunchSamples, ...]
    inside_s: float
    starting_s: float
    verdict: Verdict
    is_small: bool
    may_be_small: bool | None = None
    """None in a recording of methodology 4 or older, which did not say it."""
    ratio: tuple[float, float, float]
    detectable_pct: float

    @property
    def looks(self) -> Looks:
        return Looks(self.first_launches, self.max_launches)

    @property
    def words(self) -> str:
        """The verdict as a table would print it."""
        return Judgement(self.verdict, self.is_small, bool(self.may_be_small)).words

    @property
    def interval(self) -> Interval:
        return Interval(*self.ratio)

    @property
    def excludes_1(self) -> bool:
        return self.interval.excludes(1)

    @property
    def true_log_ratio(self) -> float:
        """By what was planted, and the baseline's typical trial in each launch: over the launches what the published ratio is over them."""
        return fmean(math.log1p(self.planted_wait_us / median(launch.baseline_us)) for launch in self.launches)


def evidence_after(launches: Iterable[LaunchSamples], looks: Looks) -> Evidence:
    """What the service's rule has before it after these launches."""
    measured = list(launches)
    logs, logs_min = [launch.log_ratio for launch in measured], [launch.log_ratio_min for launch in measured]
    pairs = sum(len(launch.baseline_us) for launch in measured)
    return Evidence(tuple(logs), tuple(logs_min), looks.share(len(measured)), pairs)


def write(recording: Recording, path: Path) -> None:
    """Appends a line; what was measured is on disk before the next comparison begins."""
    with path.open("a") as file:
        file.write(recording.model_dump_json() + "\n")


def read(paths: Iterable[Path]) -> Iterator[Recording]:
    """
    Raises:
        UserError: A file that is not there, or a line that is no recording; says which.
    """
    for path in paths:
        try:
            lines = path.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"FILE: {str(path)!r} cannot be read: {getattr(error, 'strerror', None) or 'it is no text'}"
            ) from None
        for number, line in enumerate(lines, 1):
            try:
                yield Recording.model_validate_json(line)
            except ValidationError as error:
                first = error.errors()[0]
                where = ".".join(map(str, first["loc"]))
                raise UserError(f"FILE: {path}:{number} is no recording of a calibration: {where} {first['msg']}") from None


assert OTHER_ARM != BASELINE_ARM
