"""How nights ended, as tags of their summary runs: what the table of nights shows first."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from service.history.store import NightStore, Outcome
from service.store.columns import EARLIER_SERIES, NIGHTS_SERIES, SERIES_TAG, STATUS_TAG
from service.store.home import Home

TITLE_TAG, MOVED_TAG = "night_title", "moved"
RECENT_NIGHTS = 40
"""How many nights the nights' view shows, and how many statuses are brought up to date: older ones no longer change, and MLflow takes a second
longer to draw a hundred rows. The curves over nights show them all."""
MOST_AT_ONCE = 1000


def publish_statuses(client: Any, experiment_id: str, home: Home) -> dict[str, str]:
    """Brings the tags up to date; sweep_id -> one line on how its night ended.

    `cplab nightly` publishes a night once it is read. One that was published before (by a crash in between, or measured again since) is brought up to
    date by whoever comes next: the next publication, or the dashboard.
    """
    condition = f"tags.role = 'summary' AND tags.{SERIES_TAG} = '{NIGHTS_SERIES}'"
    found = client.search_runs([experiment_id], condition, max_results=MOST_AT_ONCE, order_by=["attributes.start_time DESC"])
    if not found:
        return {}
    runs, earlier = found[:RECENT_NIGHTS], found[RECENT_NIGHTS:]
    for run in earlier:
        _set(client, run, {SERIES_TAG: EARLIER_SERIES})
    titles: dict[str, str] = {}
    last: dict[str, Outcome] = {}
    with contextlib.closing(NightStore(home.folder)) as nights:
        for run in runs:
            tags = run.data.tags
            outcome = nights.outcome(tags["experiment"], tags["night"])
            if outcome is None:
                continue
            stands = outcome.sweep_id == tags["sweep_id"]
            title = str(outcome.summary["title"]) if stands else "measured again"
            _set(
                client,
                run,
                {STATUS_TAG: outcome.status if stands else title, TITLE_TAG: title, MOVED_TAG: _moves(outcome) if stands else ""},
            )
            titles[tags["sweep_id"]] = title
            if stands:
                last.setdefault(outcome.experiment, outcome)
    for outcome in last.values():
        _tell_histories(client, experiment_id, outcome)
    return titles


def _tell_histories(client: Any, experiment_id: str, outcome: Outcome) -> None:
    """What the last night says of each series, on the series' own run."""
    moved = {(found["cell_id"], found["arm"]): _words(found) for found in outcome.summary["findings"]}
    condition = f"tags.role = 'history' AND tags.sweep_id = '{outcome.sweep_id}'"
    for run in client.search_runs([experiment_id], condition, max_results=1000):
        tags = run.data.tags
        _set(client, run, {MOVED_TAG: moved.get((tags["cell_id"], tags["arm"]), "no")})


def _moves(outcome: Outcome) -> str:
    """The gravest finding of a night, and how many more there are."""
    found = sorted(outcome.summary["findings"], key=lambda finding: -abs((finding["ratio"] or finding["baseline"])["log"]))
    more = f", {len(found) - 1} more" if len(found) > 1 else ""
    return f"{_words(found[0])}{more}" if found else "nothing"


def _words(finding: Mapping[str, Any]) -> str:
    move = finding["ratio"] or finding["baseline"]
    return f"{move['pct']:+.1f} % {finding['first_bad']['night'][5:]} {finding['suspect']}"


def _set(client: Any, run: Any, tags: Mapping[str, str]) -> None:
    for name, text in tags.items():
        if text and run.data.tags.get(name) != text:
            client.set_tag(run.info.run_id, name, text)
