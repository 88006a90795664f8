"""Looks: at which numbers of launches a comparison is read, and what share of its error each reading may spend.

A comparison that is read again and again until it says something says it too often. So the readings are planned: the first after `first`
launches, the last after `last`, a few between in geometric steps, and the error of 5 % is shared out among them in advance, in
proportion to the launches that each one adds (a linear spending function, Lan and DeMets, Biometrika 70, 1983). At a look after n launches
the interval is Student's t at 1 - alpha w(n); by the union bound all the looks' intervals hold together, whatever the dependence between
them and at whichever look the run stops (repeated confidence intervals: Jennison and Turnbull, J. R. Stat. Soc. B 51, 1989).

The union bound is wider than boundaries from the joint normal law of the looks: by 8 % at the last of 8, 13, 20 and by 9 % at the last of 5, 8
(simulated); it needs neither that law nor a table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

GROWTH = 1.6
"""Launches of a look over those of the look before, about: denser looks stop sooner and make every interval wider."""


@dataclass(frozen=True)
class Looks:
    """The planned looks of a comparison of at least `first` and at most `last` launches."""

    first: int
    last: int

    def __post_init__(self) -> None:
        assert 1 <= self.first <= self.last, f"looks from {self.first} to {self.last}"

    @property
    def planned(self) -> tuple[int, ...]:
        """Numbers of launches after which the data are looked at, in order."""
        steps = max(1, round(math.log(self.last / self.first, GROWTH))) if self.last > self.first else 0
        ratio = self.last / self.first
        return tuple(sorted({round(self.first * ratio ** (i / steps)) for i in range(steps + 1)} if steps else {self.first}))

    def last_planned(self, launches: int) -> int:
        """The last planned look at or before so many launches; 0 before the first. What may be read where the run was stopped, or is being
        watched, by someone who saw the data: readings between looks are not paid for then."""
        return max((n for n in self.planned if n <= launches), default=0)

    def share(self, launches: int) -> float:
        """w(n): the share of the error that a reading after `launches` launches spends.

        A run that ends between two looks by time or accident, not by what was seen, is read once more, then and there: that spends the
        launches since the last planned look, which is less than the next look would have.
        """
        assert launches >= 1, "nothing to look at"
        counted = min(launches, self.last)
        before = max((n for n in self.planned if n < counted), default=0)
        return (counted - before) / self.last
