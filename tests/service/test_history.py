"""History: steps found where planted and not elsewhere, suspects by which series moved, nothing mixed that means other things."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.names import Logits, Stages
from experiments.spec.arms import ArmSpec
from service.history.change_points import Scatter, find_steps, launch_variances, level, scatter_of
from service.history.series import History, Key, Kind, NightPoints, Point, Value, factors_of, histories_of
from service.history.suspect import LOOKS, MIN_NIGHTS, Finding, Move, Suspect, read_night

LAUNCHES = 12
QUIET = Scatter(1.0, 200.0)


def value(rng: random.Random, log: float, sd: float, launches: int = LAUNCHES) -> Value:
    logs = [rng.gauss(log, sd) for _ in range(launches)]
    mean = sum(logs) / launches
    return Value(mean, math.sqrt(sum((x - mean) ** 2 for x in logs) / (launches - 1) / launches), launches)


def cell(
    nights: int = 30,
    *,
    ratio: dict[int, float] | None = None,
    times: dict[int, float] | None = None,
    aa: dict[int, float] | None = None,
    seed: int = 0,
    name: str = "a",
    setting: str = "one",
) -> History:
    """Nights with planted logarithms by night, each added from its night on (`aa`: on it alone)."""
    rng, points = random.Random(f"{seed}{name}"), []
    for n in range(nights):
        log_ratio = -0.2 + sum(step for night, step in (ratio or {}).items() if n >= night)
        log_time = 7 + sum(step for night, step in (times or {}).items() if n >= night)
        values = {
            Kind.BASELINE: value(rng, log_time, 0.05),
            Kind.ARM: value(rng, log_time + log_ratio, 0.05),
            Kind.RATIO: value(rng, log_ratio, 0.01),
            Kind.AA: value(rng, (aa or {}).get(n, 0.0), 0.01),
        }
        points.append(Point(f"2026-01-{n + 1:02d}", f"sweep{n}", values))
    return History(Key(setting, name, "overlapped"), f"cell {name}", tuple(points))


def last(history: History, nights: int) -> History:
    return History(history.key, history.label, history.points[:nights])


# Steps.


@settings(max_examples=30)
@given(st.integers(5, 25), st.floats(0.03, 0.3), st.booleans())
def test_a_step_is_found_at_its_night_with_its_size(night: int, size: float, is_worse: bool) -> None:
    size = size if is_worse else -size
    rng = random.Random(night)
    values = [value(rng, size * (n >= night), 0.01) for n in range(30)]
    (step,) = find_steps(values, QUIET, 1e-6, 1.0)
    assert step.first == night
    assert step.log == pytest.approx(size, abs=6 * step.error)


def test_one_bad_night_at_the_end_is_enough() -> None:
    rng = random.Random(1)
    values = [value(rng, 0.05 * (n == 19), 0.01) for n in range(20)]
    assert [step.first for step in find_steps(values, QUIET, 1e-4, 1.0)] == [19]


def test_a_step_below_the_minimum_has_no_name_however_sure_it_is() -> None:
    values = [Value(0.008 * (n >= 10), 1e-5, LAUNCHES) for n in range(20)]
    assert find_steps(values, QUIET, 1e-4, 1.0) == []
    assert len(find_steps(values, QUIET, 1e-4, 0.5)) == 1


def test_a_night_of_wild_launches_counts_for_what_it_is() -> None:
    """The same mean is a step from twelve good launches, and none from twelve that scatter twenty times as much."""
    rng = random.Random(2)
    quiet = [value(rng, 0, 0.01) for _ in range(20)]
    calm, wild = Value(0.05, 0.003, LAUNCHES), Value(0.05, 0.06, LAUNCHES)
    assert find_steps([*quiet, calm], QUIET, 1e-4, 1.0)
    assert not find_steps([*quiet, wild], QUIET, 1e-4, 1.0)


def test_a_night_whose_launches_agree_by_luck_is_not_believed_more() -> None:
    rng = random.Random(3)
    values = [value(rng, 0, 0.01) for _ in range(20)]
    lucky = [*values[:-1], replace(values[-1], error=1e-7)]
    assert launch_variances(lucky)[-1] == pytest.approx(launch_variances(values)[-2], rel=0.2)


@given(st.lists(st.tuples(st.floats(-1, 1), st.floats(0.01, 1)), min_size=2, max_size=12))
def test_a_level_is_the_weighted_mean(nights: list[tuple[float, float]]) -> None:
    logs, variances = np.array([x for x, _ in nights]), np.array([v for _, v in nights])
    mean, variance = level(logs, variances, 0, len(nights))
    assert mean == pytest.approx(float(np.average(logs, weights=1 / variances)))
    assert variance == pytest.approx(1 / sum(1 / v for v in variances))


def test_nights_that_differ_more_than_their_launches_say_widen_what_is_needed() -> None:
    rng = random.Random(4)
    calm = [[value(rng, 0, 0.01) for _ in range(40)] for _ in range(6)]
    moody = [[value(rng, rng.gauss(0, 0.01), 0.01) for _ in range(40)] for _ in range(6)]
    assert scatter_of(calm, shares_nights=False).inflation < 1.5
    assert scatter_of(moody, shares_nights=False).inflation > 5
    assert scatter_of(moody, shares_nights=True).degrees == 39


# Suspects.


def read(*cells: History, **more):
    return read_night(cells, 1.0, **more)


def quiet_cells(**planted) -> list[History]:
    return [cell(name=name, seed=5, **planted) for name in "bcdef"]


def test_quiet_nights_have_no_finding() -> None:
    reading = read(cell(), *quiet_cells())
    assert (reading.findings, reading.untrusted, reading.young, reading.judged) == ((), (), (), 6)
    assert 0.5 < max(reading.detectable_pct.values()) < 3


def test_a_ratio_that_moved_alone_is_code_and_its_first_night_is_named() -> None:
    (found,) = read(cell(ratio={28: 0.05}), *quiet_cells()).findings
    assert (found.suspect, found.label, found.arm) == (Suspect.CODE, "cell a", "overlapped")
    assert (found.last_good.night, found.first_bad.night, found.nights) == ("2026-01-28", "2026-01-29", 2)
    assert found.is_worse and found.is_new
    assert found.ratio is not None and found.ratio.pct == pytest.approx(5.1, abs=1)


def test_times_that_moved_in_both_arms_are_environment() -> None:
    (found,) = read(*(cell(name=name, times={29: 0.3}) for name in "abcd")).findings
    assert (found.suspect, found.ratio, found.label) == (Suspect.ENVIRONMENT, None, "")
    (one,) = read(cell(times={29: 0.3}), *quiet_cells()).findings
    assert (one.suspect, one.ratio, one.label) == (Suspect.ENVIRONMENT, None, "cell a")


def test_a_ratio_that_moved_with_all_times_is_environment() -> None:
    findings = read(*(cell(name=name, times={29: 0.4}, ratio={29: 0.05} if name == "a" else None) for name in "abcd")).findings
    (moved,) = [f for f in findings if f.ratio is not None]
    assert (moved.suspect, moved.label) == (Suspect.ENVIRONMENT, "cell a")


def test_a_ratio_that_moved_beside_its_aa_is_neither() -> None:
    reading = read(cell(ratio={29: 0.05}, aa={29: 0.05}), *quiet_cells())
    assert [f.suspect for f in reading.findings] == [Suspect.NEITHER]
    assert [label for label, _ in reading.untrusted] == ["cell a"]


def test_a_baseline_that_got_slower_alone_is_code_for_the_better() -> None:
    """What the baseline alone lost is no environment: the arm stood beside it."""
    history = cell(ratio={29: -0.08}, times={29: 0.08})
    (found,) = read(history, *quiet_cells()).findings
    assert (found.suspect, found.is_worse) == (Suspect.CODE, False)


def test_an_improvement_is_news_for_a_few_nights() -> None:
    faster = [read(last(cell(ratio={15: -0.05}), n), *(last(c, n) for c in quiet_cells())).findings for n in range(15, 22)]
    assert [bool(found) for found in faster] == [False, *[True] * LOOKS, False, False, False]


def test_a_regression_stays_open_until_the_level_is_back() -> None:
    cells = [cell(ratio={10: 0.05, 20: -0.05}), *quiet_cells()]
    carried: tuple[Finding, ...] = ()
    state = []
    for n in range(MIN_NIGHTS, 31):
        carried = read(*(last(c, n) for c in cells), carried=carried).findings
        state.append(any(f.is_worse for f in carried))
    assert state == [11 <= n <= 20 for n in range(MIN_NIGHTS, 31)]


def test_a_blessed_night_accepts_what_began_before_it() -> None:
    cells = [cell(ratio={25: 0.05}), *quiet_cells()]
    assert read(*cells).findings
    assert read(*cells, blessed="2026-01-25").findings
    assert not read(*cells, blessed="2026-01-26").findings


def test_a_regression_outlives_the_nights_that_saw_it_begin() -> None:
    """After 50 nights the level before is out of sight; the finding is carried with its level, on the same machine only."""
    history = cell(30, seed=7)
    old = Point("2025-10-01", "sweep-old", {})
    known = Finding(Suspect.CODE, "cell a", "a", "overlapped", Move(0.05, 0.01), None, None, old, old, 50, -0.25, "one")
    (found,) = read(history, *quiet_cells(), carried=[known]).findings
    assert (found.first_bad.night, found.nights) == ("2025-10-01", 51)
    assert not read(history, *quiet_cells(), carried=[replace(known, before=-0.2)]).findings
    assert not read(history, *quiet_cells(), carried=[replace(known, setting="another machine")]).findings


def test_what_was_not_measured_has_not_recovered() -> None:
    old = Point("2026-01-20", "sweep", {})
    known = Finding(Suspect.CODE, "gone", "gone", "overlapped", Move(0.05, 0.01), None, None, old, old, 5, -0.25, "one")
    assert read(cell(), *quiet_cells(), carried=[known]).findings == (known,)
    assert read(carried=[known]).findings == (known,)


def test_young_series_are_not_judged_and_say_so() -> None:
    nights = MIN_NIGHTS - 1
    reading = read(last(cell(ratio={nights - 1: 0.3}), nights), cell(name="b"))
    assert (reading.findings, reading.young, reading.judged) == ((), ("cell a",), 1)


def test_a_slow_drift_of_all_times_is_never_code() -> None:
    drift = dict.fromkeys(range(60), 0.005)
    cells = [cell(28, name=name, times=drift) for name in "abcdef"]
    for n in range(MIN_NIGHTS, 29):
        assert all(f.suspect is Suspect.ENVIRONMENT for f in read(*(last(c, n) for c in cells)).findings)


# Series.


def test_other_settings_cells_and_arms_are_series_of_their_own() -> None:
    def night(name: str, *keys: Key) -> NightPoints:
        return NightPoints(name, name, tuple((key, key.cell_id, Point(name, name, {})) for key in keys))

    here, there = Key("this machine", "a", "x"), Key("another", "a", "x")
    nights = [night("1", here), night("2", there), night("3", here, Key("this machine", "b", "x"), Key("this machine", "a", "y"))]
    found = {(h.key.cell_id, h.key.arm): [p.night for p in h.points] for h in histories_of(nights)}
    assert found == {("a", "x"): ["1", "3"], ("b", "x"): ["3"], ("a", "y"): ["3"]}


def test_a_factor_that_came_later_ends_no_series_until_it_is_used():
    """The digest of a setting is kept with every night: what nights from before the factor had must come out again."""
    first = {
        **{"schedule": "serial", "payload": "bf16", "transport": "collective", "stages": "separate", "execution": "eager"},
        **{"reserved_sms": 0, "planted_wait_us": 0.0},
    }
    assert factors_of(ArmSpec()) == first
    assert factors_of(ArmSpec(logits=Logits.DEEPGEMM)) == {**first, "logits": "deepgemm"}
    assert factors_of(ArmSpec(stages=Stages.FUSED)) == {**first, "stages": "fused"}
