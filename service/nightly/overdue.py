"""Overdue nights: what a scheduler that died leaves behind is silence, which only somebody else can notice."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from datetime import date, timedelta

from service.history.store import FILE_NAME, NightStore
from service.store.home import Home

HABIT_DAYS, HABIT_NIGHTS = 7, 3
"""An experiment whose last week had so many nights is one that is measured every night."""

RESTS_AFTER_DAYS = 30
"""One that has had none for so long has been given up on purpose."""


def overdue(home: Home, today: date) -> list[str]:
    """A line for every experiment whose nights have stopped coming; `today` is the UTC date. The night of today may still come."""
    if not (home.folder / FILE_NAME).exists():
        return []
    with contextlib.closing(NightStore(home.folder)) as store:
        outcomes = store.outcomes()
    nights, status = defaultdict[str, set[date]](set), dict[str, str]()
    for outcome in outcomes:  # in the order of nights
        nights[outcome.experiment].add(date.fromisoformat(outcome.night[:10]))
        status[outcome.experiment] = outcome.status
    lines = []
    for experiment, dates in sorted(nights.items()):
        last = max(dates)
        days = (today - last).days
        recent = [day for day in dates if day > last - timedelta(days=HABIT_DAYS)]
        if 1 < days <= RESTS_AFTER_DAYS and len(recent) >= HABIT_NIGHTS:
            lines.append(
                f"no night of {experiment} for {days - 1} days: the last was {last} ({status[experiment]}); is its schedule alive?"
            )
    return lines
