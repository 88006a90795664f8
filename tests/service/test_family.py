"""Levels of families: the published interval excludes 1 exactly where Benjamini and Hochberg find something."""

from __future__ import annotations

import gc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import false_discovery_control

from experiments.names import Verdict
from service.judge.comparison import Evidence
from service.judge.family import discovery_level, flagged
from service.judge.verdict import judge

p_values = st.lists(st.floats(0, 1, allow_nan=False), min_size=1, max_size=40)


@given(p_values, st.sampled_from([0.01, 0.05, 0.2]))
def test_the_level_finds_what_benjamini_and_hochberg_find(ps, rate):
    level = discovery_level(ps, rate)
    ours = [p <= level for p in ps]
    adjusted = false_discovery_control(ps)
    for p_adjusted, is_found in zip(adjusted, ours, strict=True):
        if abs(p_adjusted - rate) > 1e-9:  # exactly on the line, rounding decides
            assert (p_adjusted <= rate) == is_found


@given(p_values)
def test_a_family_of_one_is_not_corrected(ps):
    assert discovery_level(ps[:1], 0.05) == 0.05


def test_a_family_needs_members():
    with pytest.raises(ValueError, match="p-values"):
        discovery_level([], 0.05)
    assert flagged([], 0.05) == []


@given(
    st.lists(
        st.lists(st.integers(-2000, 2000).map(lambda i: i / 1e4), min_size=5, max_size=8).filter(lambda v: len(set(v)) > 2),
        min_size=1,
        max_size=12,
    ),
    st.floats(0.1, 1.0),
)
def test_headline_and_table_cannot_disagree(launches, share):
    family = [Evidence(tuple(logs), tuple(logs), share, 8) for logs in launches]
    level = discovery_level([e.p_value for e in family], 0.05)
    for evidence in family:
        if abs(evidence.p_value / level - 1) > 1e-6:
            assert evidence.read(level, 0.05).ratio.excludes(1) == (evidence.p_value <= level)


@given(
    st.lists(st.integers(-2000, 2000).map(lambda i: i / 1e5), min_size=5, max_size=8).filter(lambda v: len(set(v)) > 2),
    st.floats(0.1, 1.0),
    st.floats(0.3, 4),
)
def test_same_and_its_p_value_agree(logs, share, band):
    evidence = Evidence(tuple(logs), tuple(logs), share, 8)
    p = evidence.p_same(band)
    if abs(p / 0.05 - 1) > 1e-6:
        inside = evidence.read(0.05, 0.05).ratio_90.inside(1 - band / 100, 1 + band / 100)
        assert inside == (p <= 0.05)


def test_quiet_sweeps_are_flagged_one_in_twenty(monkeypatch):
    monkeypatch.setattr(gc, "collect", int)  # a tenth of a second a call
    rng = np.random.default_rng(2)
    flags = sum(any(flagged(list(rng.uniform(size=6)), 0.05)) for _ in range(1000))
    assert 30 <= flags <= 70


def test_one_bad_pair_flags_itself_alone():
    assert flagged([0.0001, 0.5, 0.9], 0.05) == [True, False, False]


def test_claims_that_the_fastest_ranks_strike_out_do_not_pay_for_others():
    """Ten arms differ on their slowest ranks alone, so nothing may be claimed of them; ten are equal. Counted by the slowest ranks, the ten would
    double the level of the others."""
    rng = np.random.default_rng(5)
    sweeps, false = 400, {"p_claim": 0, "p_value": 0}
    for _ in range(sweeps):
        family = []
        for arm in range(20):
            logs = rng.normal(0.05 if arm < 10 else 0.0, 0.01, 8)
            family.append(Evidence(tuple(logs), tuple(rng.normal(0, 0.01, 8)) if arm < 10 else tuple(logs), 1.0, 100))
        for name in false:
            level = discovery_level([getattr(e, name) for e in family], 0.05)
            claims = [judge(e.read(level, 0.05), 0.0).verdict for e in family[10:]]
            false[name] += any(word in (Verdict.FASTER, Verdict.SLOWER) for word in claims)
    assert false["p_claim"] / sweeps < 0.09  # 5 %, and three standard errors
    assert false["p_value"] / sweeps > 0.15  # what it would be


def test_a_claim_needs_both_reductions_to_point_one_way():
    apart = Evidence((0.05, 0.051, 0.049), (-0.05, -0.051, -0.049), 1.0, 9)
    assert apart.p_value < 0.01
    assert apart.p_claim == 1.0
    agreed = Evidence((0.05, 0.051, 0.049), (0.02, 0.03, 0.01), 1.0, 9)
    assert agreed.p_claim > agreed.p_value
