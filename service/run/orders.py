"""What is run in which order: the blocks of arms, and the control blocks of the accounting."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from experiments.names import AA_ARM, BASELINE_ARM, Control, Schedule
from experiments.spec.arms import ArmSpec
from experiments.spec.blocks import block_rows
from experiments.spec.experiment import ExperimentSpec
from service.judge.judging import serial_arm
from service.judge.results import SERIAL_CONTROL
from workers.messages import RunBlock, TrialOrder, Variant

ARMS = "arms"
CONTROLS = "controls"


def control_variants(arms: Mapping[str, ArmSpec]) -> list[str]:
    """The variants of a control block: C_a of every arm, the events alone of every arm that forks, the gather alone."""
    serial = serial_arm(arms)
    variants = [Variant(name, Control.PREFILLED) for name in arms]
    variants += [Variant(name, Control.ZERO_BYTE) for name, arm in arms.items() if arm.schedule != Schedule.SERIAL]
    variants.append(Variant(serial, Control.GATHER_ALONE))
    if serial == SERIAL_CONTROL:
        variants += [Variant(serial), Variant(serial, Control.PREFILLED)]
    return [variant.key for variant in variants]


def timed_arms(spec: ExperimentSpec) -> dict[str, ArmSpec]:
    """The arms of a block: the spec's, and the baseline once more under another name."""
    return {**spec.arms, AA_ARM: spec.arms[BASELINE_ARM]} if spec.measurement.aa else dict(spec.arms)


def arms_with_serial(arms: Mapping[str, ArmSpec]) -> dict[str, ArmSpec]:
    """The arms that ranks prepare: those given, and a `serial` one for the controls when none of them is."""
    if serial_arm(arms) == SERIAL_CONTROL:
        return {**arms, SERIAL_CONTROL: ArmSpec()}
    return dict(arms)


def block_of(variants: list[str], trials: int, num_steps: int, *identity: object) -> RunBlock:
    """A block of at least `trials` trials of each variant: row by row, within a row step by step, so that pairs are neighbours.

    `identity` seeds the order: the same block of the same launch is ordered alike when it is run again, and no two are alike.
    """
    return _in_order(_rows(variants, trials, identity), num_steps)


def warm_up_of(variants: list[str], trials: int, num_steps: int, *identity: object) -> RunBlock:
    """`trials` trials of each variant, not balanced: nothing of it is kept."""
    return _in_order(_rows(variants, trials, identity)[:trials], num_steps)


def _rows(variants: list[str], trials: int, identity: tuple[object, ...]) -> list[list[str]]:
    seed = int.from_bytes(hashlib.sha256(repr(identity).encode()).digest()[:8], "big")
    return block_rows(variants, trials, seed)


def _in_order(rows: list[list[str]], num_steps: int) -> RunBlock:
    return RunBlock(
        tuple(TrialOrder(variant, index, step) for index, row in enumerate(rows) for step in range(num_steps) for variant in row)
    )
