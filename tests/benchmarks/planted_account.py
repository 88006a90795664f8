"""The account on the simulated lanes: each figure against what was planted, through ranks, records and judgement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from experiments.names import Device
from experiments.spec.simulation import SimulationSpec
from service.run.local_ranks import LocalRank
from service.run.rank_group import RankGroup
from service.store.records import Records
from tests.hosts.sweep import make_spec, run_on

BYTES_PER_TOKEN = 128
"""Into each of two ranks: the other's half of the tokens, 256 B each."""
PLANTED_TOKENS = 512

PLANTED = SimulationSpec(
    wq_b_us=9000,
    wk_us=1000,
    norm_k_us=500,
    rope_us=3000,
    rotate_q_us=13000,
    rotate_k_us=250,
    fork_us=60,
    join_us=90,
    main_slowdown=0.15,
)
"""Stage times like those of 512 tokens of `mini` on two cores; the tax and the contention are larger than they need to be."""


@dataclass(frozen=True)
class SimulatedPoint:
    """One planted rate: each figure as (found, planted), us per layer or a share of G."""

    rate_mbps: float
    figures: dict[str, tuple[float, float]]

    @property
    def worst(self) -> float:
        """The largest departure from what was planted, relative to it (to 1 where it is less)."""
        return max(abs(found - planted) / max(1.0, abs(planted)) for found, planted in self.figures.values())


def planted_figures(s: SimulationSpec) -> dict[str, float]:
    """What the account must find, in closed form."""
    window_us, gather_us, slow = s.rotate_q_us, s.gather_us, 1 + s.main_slowdown
    compute_us = s.wq_b_us + s.wk_us + s.norm_k_us + s.rope_us + s.rotate_k_us + window_us
    # The rotation runs slower until the gather ends.
    rotation_us = window_us * slow if window_us * slow <= gather_us else gather_us + window_us - gather_us / slow
    total_us = compute_us - window_us + s.fork_us + max(rotation_us, gather_us) + s.join_us
    return {
        "gather_us": gather_us,
        "total_us": total_us,
        "ideal_us": compute_us - window_us + max(window_us, gather_us),
        "fork_join_tax_us": s.fork_us + s.join_us,
        "contention_us": max(rotation_us, gather_us) - max(window_us, gather_us),
        "saved_us": compute_us + gather_us - total_us,
        "hidden": 1 - (total_us - compute_us) / gather_us,
        "hidden_ideal": min(window_us, gather_us) / gather_us,
    }


def planted_at(rate_mbps: float) -> SimulationSpec:
    return PLANTED.model_copy(update={"gather_us": PLANTED_TOKENS * BYTES_PER_TOKEN * 8 / rate_mbps})


class StandingGroup(RankGroup):
    """Ranks that stay up from launch to launch and sweep to sweep: virtual time knows no launch effects, and new ones cost seconds."""

    def launch(self, timeout_s: float, gather_timeout_s: float, device: Device, import_paths: Sequence[str]) -> None:
        if not self.joined:
            super().launch(timeout_s, gather_timeout_s, device, import_paths)

    def close(self) -> None:
        """Not yet: see `end`."""

    def end(self) -> None:
        super().close()


def measure_simulated(rates_mbps: Sequence[float], records: Records) -> list[SimulatedPoint]:
    """The same rates, planted: through ranks, records and judgement."""
    group = StandingGroup([LocalRank(), LocalRank()])
    try:
        return [_measure_planted(rate_mbps, group, records) for rate_mbps in rates_mbps]
    finally:
        group.end()


def _measure_planted(rate_mbps: float, group: RankGroup, records: Records) -> SimulatedPoint:
    measurement = {
        "launches": 5,
        "blocks": 1,
        "trials_per_block": 2,
        "control_trials": 2,
        "warmup_trials": 1,
        "inputs": 2,
        "aa": False,
    }
    simulation = planted_at(rate_mbps)
    spec = make_spec("accounting_simulated", measurement, device=Device.SIMULATED, simulation=simulation)
    result = run_on(lambda _: group, spec, records, {"kind": "simulated"})
    found = result.cells[0].arms[1].account
    assert found is not None
    planted = planted_figures(simulation)
    return SimulatedPoint(rate_mbps, {name: (getattr(found, name).estimate, value) for name, value in planted.items()})
