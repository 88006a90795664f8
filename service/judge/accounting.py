"""Accounting: where an arm's time goes, in us. Pure arithmetic on reduced times; `experiments/METHODOLOGY.md` defines every figure.

T is the time of the scope; C_a the same arm whose gather returns at once a prefilled, correct buffer; Z_a the arm with its real fork and
join around a gather of nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from service.judge.interval import Interval, fieller_interval, jackknife_interval, standard_error

MIN_GATHER_US = 2.0
MIN_GATHER_ERRORS = 3.0
"""`hidden` is blank unless G exceeds both: a share of nothing is noise."""


@dataclass(frozen=True)
class ArmTimes:
    """Reduced times of one arm in one launch, us.

    Attributes:
        total_us: T(a).
        compute_us: T(C_a).
        zero_byte_us: T(Z_a); for an arm without a fork equal to `compute_us`.
        window_us: W_a, main-lane time in C_a from the launch point to the join; 0 for a gather on the main lane.
    """

    total_us: float
    compute_us: float
    zero_byte_us: float
    window_us: float


@dataclass(frozen=True)
class Account:
    """One arm's account in one launch, us; `hidden` and `hidden_ideal` are shares of `gather_us`."""

    total_us: float
    compute_us: float
    exposed_us: float
    gather_us: float
    window_us: float
    ideal_us: float
    fork_join_tax_us: float
    contention_us: float
    saved_us: float

    @property
    def covered_us(self) -> float:
        """The part of G that is not exposed: the numerator of `hidden`."""
        return self.gather_us - self.exposed_us

    @property
    def coverable_us(self) -> float:
        """What the window could cover: the numerator of `hidden_ideal`."""
        return min(self.window_us, self.gather_us)


def account(arm: ArmTimes, serial: ArmTimes) -> Account:
    """The account of `arm` beside `serial` of the same payload, transport and stages."""
    return _account(
        total_us=arm.total_us,
        compute_us=arm.compute_us,
        gather_us=serial.total_us - serial.compute_us,
        window_us=arm.window_us,
        tax_us=arm.zero_byte_us - arm.compute_us,
        saved_us=serial.total_us - arm.total_us,
    )


def mean_account(accounts: Sequence[Account]) -> Account:
    """The account of the launches' mean times. A mean of their ideals would be too high: where G is about W, noise of either sign adds to
    max(0, G - W), and more launches do not help."""
    mean = {
        name: math.fsum(getattr(a, name) for a in accounts) / len(accounts)
        for name in ("total_us", "compute_us", "gather_us", "window_us", "fork_join_tax_us", "saved_us")
    }
    return _account(tax_us=mean.pop("fork_join_tax_us"), **mean)


def _account(
    *, total_us: float, compute_us: float, gather_us: float, window_us: float, tax_us: float, saved_us: float
) -> Account:
    ideal_us = compute_us + max(0.0, gather_us - window_us)
    return Account(
        total_us=total_us,
        compute_us=compute_us,
        exposed_us=total_us - compute_us,
        gather_us=gather_us,
        window_us=window_us,
        ideal_us=ideal_us,
        fork_join_tax_us=tax_us,
        contention_us=total_us - ideal_us - tax_us,
        saved_us=saved_us,
    )


@dataclass(frozen=True)
class AccountSummary:
    """The account of the launches' means, with intervals over launches, us; `hidden` with Fieller's, never clipped, None where G is lost in noise."""

    total_us: Interval
    compute_us: Interval
    exposed_us: Interval
    gather_us: Interval
    window_us: Interval
    ideal_us: Interval
    fork_join_tax_us: Interval
    contention_us: Interval
    saved_us: Interval
    hidden: Interval | None
    hidden_ideal: Interval | None


def summarise(accounts: Sequence[Account], confidence: float) -> AccountSummary:
    """The accounts of one arm, one for each launch.

    Raises:
        ValueError: No accounts.
    """

    def over_launches(name: str) -> Interval:
        return jackknife_interval(accounts, lambda some: float(getattr(mean_account(some), name)), confidence)

    def hidden_ideal(some: Sequence[Account]) -> float:
        mean = mean_account(some)
        return mean.coverable_us / mean.gather_us if mean.gather_us else math.nan

    gathers = [a.gather_us for a in accounts]
    mean_us = sum(gathers) / len(gathers)
    is_clear = len(accounts) >= 2 and mean_us > MIN_GATHER_US and mean_us > MIN_GATHER_ERRORS * standard_error(gathers)
    return AccountSummary(
        **{
            name: over_launches(name)
            for name in (
                "total_us",
                "compute_us",
                "exposed_us",
                "gather_us",
                "window_us",
                "ideal_us",
                "fork_join_tax_us",
                "contention_us",
                "saved_us",
            )
        },
        hidden=fieller_interval([a.covered_us for a in accounts], gathers, confidence) if is_clear else None,
        hidden_ideal=jackknife_interval(accounts, hidden_ideal, confidence) if is_clear else None,
    )
