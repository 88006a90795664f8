"""The paired ratio finds what was planted, and claims nothing where nothing was."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.names import Verdict
from service.judge.comparison import evidence_of, launch_log_ratios
from service.judge.interval import Interval
from service.judge.looks import Looks
from service.judge.samples import reduce_trials
from service.judge.verdict import judge
from tests.service.planted import trials


def compared(times, level=0.05, **noise):
    return compare(reduce_trials(trials(times, **noise)), level)


def compare(samples, level=0.05, arm="arm"):
    evidence = evidence_of(samples, arm, "baseline", Looks(5, 5))
    return evidence.read(level, 0.05) if evidence else None


def test_an_exact_ratio_is_found_exactly():
    comparison = compared({"baseline": 100.0, "arm": 80.0}, launch_noise=0.0)
    assert comparison.ratio.estimate == pytest.approx(0.8)
    assert comparison.launches == 5
    assert comparison.pairs == 5 * 2 * 8


def test_drift_is_paired_away():
    comparison = compared({"baseline": 100.0, "arm": 97.0}, drift=0.05)
    assert comparison.ratio.estimate == pytest.approx(0.97)


def test_steps_of_a_pass_are_summed_over_the_slowest_ranks():
    samples = reduce_trials(trials({"baseline": 10.0}, launches=1, blocks=1, rows=1, steps=7, noise=0.2, ranks=3))
    assert len(samples) == 1
    assert samples[0].max_us > samples[0].min_us >= 70.0


def test_controls_do_not_enter_the_ratio():
    both = trials({"baseline": 100.0, "arm": 80.0}) + trials({"baseline": 1.0, "arm": 500.0}, kind="controls")
    assert compare(reduce_trials(both)).ratio.estimate == pytest.approx(0.8)


def test_one_launch_gives_no_comparison():
    assert compared({"baseline": 100.0, "arm": 80.0}, launches=1) is None
    assert judge(None, 1.0).verdict is Verdict.UNRESOLVED


def test_launches_missing_an_arm_are_left_out():
    samples = [s for s in reduce_trials(trials({"baseline": 100.0, "arm": 80.0})) if not (s.launch == 2 and s.variant == "arm")]
    values, pairs = launch_log_ratios(samples, "arm", "baseline", "max_us")
    assert (len(values), pairs) == (4, 4 * 2 * 8)


@pytest.mark.parametrize(
    ("ratio", "noise", "verdict"),
    [
        (0.8, 0.001, Verdict.FASTER),
        (1.2, 0.001, Verdict.SLOWER),
        (1.0, 0.0002, Verdict.SAME),
        (1.0, 0.1, Verdict.UNRESOLVED),
    ],
)
def test_verdict_words(ratio, noise, verdict):
    comparison = compared({"baseline": 100.0, "arm": 100.0 * ratio}, launch_noise=noise, noise=noise)
    assert judge(comparison, 1.0).verdict is verdict


def test_a_small_effect_is_called_small():
    judgement = judge(compared({"baseline": 100.0, "arm": 99.5}, launch_noise=0.0001), 1.0)
    assert judgement.verdict is Verdict.FASTER
    assert judgement.is_small
    assert judgement.words == "FASTER (small)"


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (0.93, 0.97, "FASTER"),
        (0.97, 0.989, "FASTER"),
        (0.97, 0.992, "FASTER (maybe small)"),
        (0.992, 0.998, "FASTER (small)"),
        (1.002, 1.008, "SLOWER (small)"),
        (1.002, 1.03, "SLOWER (maybe small)"),
        (1.011, 1.03, "SLOWER"),
    ],
)
def test_faster_alone_claims_more_than_the_band(low: float, high: float, words: str):
    """Of equal arms, five in a hundred intervals exclude 1, and then reach into the band: the word alone must be rarer."""
    from dataclasses import replace

    comparison = compared({"baseline": 100.0, "arm": 80.0}, launch_noise=0.001)
    told = Interval((low * high) ** 0.5, low, high)
    assert judge(replace(comparison, ratio=told, ratio_min=told), 1.0).words == words
    assert "small" not in judge(replace(comparison, ratio=told, ratio_min=told), 0.0).words, "no band, nothing small"


@given(st.integers(0, 10_000))
def test_beside_any_noise_equal_times_are_refused_at_a_fifth_of_the_error_by_a_word_alone(seed):
    """A band that is narrow beside the noise holds back nothing, and an interval that just excludes 1 lies beyond it."""
    comparison = compared({"baseline": 100.0, "arm": 112.0}, launch_noise=0.05, seed=seed)
    judgement = judge(comparison, 0.01)
    if judgement.verdict is Verdict.SLOWER:
        assert judgement.may_be_small == (comparison.p_value > 0.01)
        assert not judge(comparison, 0.0).may_be_small


def test_a_winner_needs_the_fastest_rank_too():
    from dataclasses import replace

    comparison = compared({"baseline": 100.0, "arm": 80.0}, launch_noise=0.001)
    torn = replace(comparison, ratio_min=replace(comparison.ratio_min, low=0.9, high=1.1))
    assert judge(torn, 1.0).verdict is Verdict.UNRESOLVED


@pytest.mark.parametrize("launch_noise", [0.0, 0.02])
def test_equal_arms_are_seldom_called_different(launch_noise):
    """1,000 comparisons of equal arms: at 5 % the interval excludes 1 about 50 times; 35 to 65 is 2 SE either side."""
    alarms = sum(
        compared(
            {"baseline": 100.0, "arm": 100.0}, blocks=1, rows=4, noise=0.05, launch_noise=launch_noise, seed=seed
        ).ratio.excludes(1)
        for seed in range(1000)
    )
    assert 32 <= alarms <= 70
