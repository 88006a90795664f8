"""Accounting recovers planted truth exactly, on simulated lanes, for every schedule."""

from __future__ import annotations

import random
from statistics import mean, median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.names import Device
from experiments.spec.arms import ArmSpec
from experiments.spec.simulation import SimulationSpec
from service.judge.accounting import ArmTimes, account, mean_account, summarise
from service.judge.interval import mean_interval
from service.judge.judging import judge_sweep
from service.run.orders import control_variants
from service.store.records import Records
from tests.conftest import make_cell
from tests.service.synthetic import ENVIRONMENT, make_spec
from tests.workers.asking import prepare, run_block

us = st.floats(0, 1e4, allow_nan=False)


@given(us, us, us, us, us, us)
def test_the_account_adds_up(compute, window, gather, tax, contention, serial_compute):
    """T(a) = C_a + max(0, G - W) + tax + contention, whatever is planted."""
    total = compute + max(0.0, gather - window) + tax + contention
    found = account(
        ArmTimes(total, compute, compute + tax, window), ArmTimes(serial_compute + gather, serial_compute, serial_compute, 0)
    )
    assert found.gather_us == pytest.approx(gather, abs=1e-6)
    assert found.contention_us == pytest.approx(contention, abs=1e-6)
    assert found.fork_join_tax_us == pytest.approx(tax, abs=1e-6)
    assert found.ideal_us + found.fork_join_tax_us + found.contention_us == pytest.approx(found.total_us)
    assert found.exposed_us == pytest.approx(gather - found.covered_us, abs=1e-6)


def test_hidden_is_blank_when_the_gather_is_lost_in_noise():
    quiet = [account(ArmTimes(100 + n, 90, 90, 8), ArmTimes(110 + n, 90, 90, 0)) for n in range(5)]
    assert summarise(quiet, 0.95).hidden is not None
    noisy = [account(ArmTimes(100, 90, 90, 8), ArmTimes(90 + n, 90, 90, 0)) for n in (-40, 50, -30, 45, -20)]
    assert summarise(noisy, 0.95).hidden is None
    tiny = [account(ArmTimes(91, 90, 90, 8), ArmTimes(91 + n / 100, 90, 90, 0)) for n in range(5)]
    assert summarise(tiny, 0.95).hidden is None


def test_hidden_is_never_clipped():
    worse = [account(ArmTimes(140 + n, 90, 90, 8), ArmTimes(110, 90, 90, 0)) for n in range(5)]
    assert summarise(worse, 0.95).hidden.estimate < -1


def test_noise_around_an_even_gather_does_not_raise_the_ideal():
    """G is W in truth. A mean of the launches' ideals would lie 0.4 standard deviations of G too high, however many launches there are."""
    rng = random.Random(1)
    accounts = []
    for _ in range(400):
        gather_us = rng.gauss(200, 50)
        accounts.append(account(ArmTimes(800, 800, 800, 200), ArmTimes(800 + gather_us, 800, 800, 0)))
    assert mean([a.ideal_us for a in accounts]) - 800 > 15  # the bias that is avoided
    found = summarise(accounts, 0.95)
    assert abs(found.ideal_us.estimate - 800) < 8
    assert found.ideal_us.low <= 800 <= found.ideal_us.high
    assert found.hidden_ideal.estimate > 0.95


@given(st.lists(st.tuples(us, us, us, us), min_size=2, max_size=8))
def test_the_accounts_means_add_up(launches):
    accounts = [account(ArmTimes(t, c, c, w), ArmTimes(c + g, c, c, 0)) for t, c, w, g in launches]
    found = mean_account(accounts)
    assert found.ideal_us + found.fork_join_tax_us + found.contention_us == pytest.approx(found.total_us, abs=1e-6)
    assert found.total_us == pytest.approx(mean([a.total_us for a in accounts]))
    linear, by_t = summarise(accounts, 0.95).total_us, mean_interval([a.total_us for a in accounts], 0.95)
    assert (linear.low, linear.high) == pytest.approx((by_t.low, by_t.high), abs=1e-4, rel=1e-6)  # the jackknife of a mean is t


SIMULATIONS = [
    SimulationSpec(),
    SimulationSpec(main_slowdown=0.0, fork_us=0.0, join_us=0.0),
    SimulationSpec(gather_us=5, main_slowdown=0.3),
    SimulationSpec(gather_us=80, rotate_q_us=20, main_slowdown=0.25, fork_us=2, join_us=3),
    SimulationSpec(gather_us=0),
]


@pytest.mark.parametrize("simulation", SIMULATIONS)
@pytest.mark.parametrize("schedule", ["overlap_rotate", "tests.workers.mutants:overlap_again"])
@pytest.mark.parametrize(("layers", "filler_us"), [(1, 0.0), (2, 0.0), (5, 300.0)])
def test_planted_truth_is_recovered_on_simulated_lanes(pair, simulation, schedule, layers, filler_us):
    """Drained, and per layer of a streaming chain, with and without filler."""
    arms = {"baseline": ArmSpec(), "arm": ArmSpec(schedule=schedule)}
    prepare(pair, make_cell(device=Device.SIMULATED, layers=layers, filler_us=filler_us), arms, simulation=simulation)
    variants = list(arms) + control_variants(arms)
    rows = run_block(pair, variants)[0].rows

    def time_of(variant: str) -> float:
        return median(row.elapsed_us for row in rows if row.variant == variant)

    def times(arm: str) -> ArmTimes:
        windows = [row.window_us for row in rows if row.variant == f"{arm}/prefilled"]
        zero_byte = f"{arm}/zero_byte" if f"{arm}/zero_byte" in variants else f"{arm}/prefilled"
        return ArmTimes(time_of(arm), time_of(f"{arm}/prefilled"), time_of(zero_byte), median(windows))

    s = simulation
    compute = s.wq_b_us + s.wk_us + s.norm_k_us + s.rope_us + s.rotate_k_us + s.rotate_q_us
    if layers > 1:
        compute += s.carry_us + filler_us
        assert all(row.filler_us == (pytest.approx(filler_us) if filler_us else None) for row in rows if row.variant == "arm")
    assert time_of("baseline") == pytest.approx(compute + s.gather_us)
    assert time_of("baseline/gather_alone") == pytest.approx(s.gather_us)

    found = account(times("arm"), times("baseline"))
    assert found.compute_us == pytest.approx(compute)
    assert found.gather_us == pytest.approx(s.gather_us)
    assert found.window_us == pytest.approx(s.rotate_q_us)
    assert found.ideal_us == pytest.approx(compute + max(0.0, s.gather_us - s.rotate_q_us))
    assert found.fork_join_tax_us == pytest.approx(s.fork_us + s.join_us)
    # Under a gather in flight the rotation runs at 1 / (1 + slowdown); what that costs beyond the gather's own end is contention.
    slow = 1 + s.main_slowdown
    rotation = s.rotate_q_us * slow if s.rotate_q_us * slow <= s.gather_us else s.gather_us + s.rotate_q_us - s.gather_us / slow
    planted = max(rotation, s.gather_us) - max(s.rotate_q_us, s.gather_us)
    assert found.contention_us == pytest.approx(planted, abs=1e-9)


def test_serial_accounts_for_itself(pair):
    arms = {"baseline": ArmSpec(), "arm": ArmSpec()}
    prepare(pair, make_cell(device=Device.SIMULATED), arms)
    rows = run_block(pair, ["arm", "arm/prefilled"])[0].rows
    arm = median(r.elapsed_us for r in rows if r.variant == "arm")
    free = median(r.elapsed_us for r in rows if r.variant == "arm/prefilled")
    found = account(ArmTimes(arm, free, free, 0.0), ArmTimes(arm, free, free, 0.0))
    assert found.covered_us == 0
    assert found.saved_us == 0
    assert found.fork_join_tax_us == 0


def records_of(pair, cell, arms, launches=3):
    """What the records would hold of a simulated cell after some launches."""
    blocks = []
    for launch in range(launches):
        prepare(pair, cell, arms)
        for kind, variants in (("arms", list(arms)), ("controls", control_variants(arms))):
            blocks.append((launch, kind, run_block(pair, variants)))
    return blocks


@pytest.mark.parametrize("skew_us", [0.0, 80.0])
def test_planted_truth_comes_through_the_records_of_a_streaming_sweep(pair, tmp_path, skew_us):
    """From the ranks over the records to the judged account: exact without a skew, and a skew shows as lateness and in no other figure
    than the one layer that it was planted in."""
    layers = 4
    spec = make_spec(
        device="simulated",
        cells={"cp_size": 2, "fabric": ["process_group", "emulated_20mbit"], "regime": "streaming", "skew_us": skew_us},
        chain={"layers": layers},
        measurement={"aa": False},
    )
    cell = spec.expand().cells[0]
    records = Records(tmp_path / "records.db")
    records.start_sweep("s", spec, [cell], ENVIRONMENT, None)
    for launch, kind, reports in records_of(pair, cell, spec.arms):
        records.add_block("s", cell.cell_id, launch, kind, 0, reports, 1.0)
    judged = judge_sweep(records.cells("s"), spec).cells[0]
    records.close()
    s, found = spec.simulation, judged.arms[1].account
    compute = s.wq_b_us + s.wk_us + s.norm_k_us + s.rope_us + s.rotate_k_us + s.rotate_q_us + s.carry_us
    # Two ranks: the early one waits for the skew once in a chain, and the median over ranks is their mean.
    waited = skew_us / layers / 2
    assert judged.lateness_us == (0.0, pytest.approx(skew_us / layers, abs=1e-2))
    assert found.compute_us.estimate == pytest.approx(compute, abs=1e-2)
    assert found.gather_us.estimate == pytest.approx(s.gather_us + waited, abs=1e-2)
    assert found.window_us.estimate == pytest.approx(s.rotate_q_us, abs=1e-2)
    assert found.fork_join_tax_us.estimate == pytest.approx(s.fork_us + s.join_us, abs=1e-2)
    assert found.contention_us.estimate == pytest.approx(0, abs=1e-2)
    assert found.hidden.estimate == pytest.approx((s.rotate_q_us - s.fork_us - s.join_us) / (s.gather_us + waited), abs=1e-3)
