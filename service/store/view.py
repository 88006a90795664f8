"""Prepared views: what a reviewer sees first. MLflow keeps them as tags of the experiment, and a link opens one.

Two of them: `last`, the suite's last sweep with its cells, curves and histories; and `nights`, one row a night beside the same histories. They hold
the state of the dashboard's own controls, so everything in them can be changed by hand, and the link brings the prepared state back.
"""

from __future__ import annotations

import base64
import contextlib
import json
import time
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from service.store.charts import bars, chart_state, lines
from service.store.columns import NIGHTS_SERIES, PLACE_TAG, SERIES_TAG, STATUS_TAG
from service.store.planned_run import COMPLETE_TAG

VIEW_TAG = "mlflow.sharedViewState."
LAST, NIGHTS = "cplab-last", "cplab-nights"

SWEEP_COLUMNS = {
    **{"verdict": 106, "arm": 84, "shape": 211, "ratio": 131, "hidden": 62, "tok_s": 54, "aa": 57, "rev": 72},
    # Beyond the screen's edge while MLflow's side panel is open: the view's name says the night, too.
    "night": 90,
}
"""Tag -> width in pixels: room for the longest usual text. On a screen 1600 pixels wide MLflow leaves 938 beside its panels."""

NIGHT_COLUMNS = {
    **{"night": 86, "status": 106, "moved": 172, "ratio": 131, "shape": 211, "aa": 57},
    **{"rev": 72, "verdict": 130, "hosts": 110},
}

RUN_NAME, CREATED = "attributes.`Run Name`", "runDateAndNestInfo"
OWN_COLUMNS = {RUN_NAME: 49, CREATED: 36}
"""MLflow's own, which always stand first: the link, and the mark of a run's status without its age. Columns of ours say what the name does."""

CHAR_PX, PADDING_PX, MAX_ARM_PX = 6.2, 22, 160


@dataclass(frozen=True)
class Contents:
    """What there is to show of a suite.

    Attributes:
        sweep_id, title: Of the last sweep.
        arms: Its arms' names.
        has_curves, has_histories: Of that sweep.
        last_night: The last sweep that is a night; empty without one.
    """

    sweep_id: str
    title: str
    arms: tuple[str, ...]
    has_curves: bool
    has_histories: bool
    last_night: str


@dataclass(frozen=True)
class View:
    """A prepared view. `id` is its key in the link."""

    id: str
    name: str
    state: Mapping[str, Any]


def view_link(uri: str, experiment_id: str, view_id: str, is_chart: bool = False) -> str:
    """Opens a view. A search filter or an order in the link would void it."""
    mode = "&compareRunsMode=CHART" if is_chart else ""
    page = f"{uri.rstrip('/')}/#/experiments/{experiment_id}/runs?workflowType=machine_learning"
    return f"{page}&viewStateShareKey={view_id}{mode}"


def views_of(contents: Contents) -> list[View]:
    """The views that there is something to show in."""
    views = [_last(contents)]
    if contents.last_night:
        views.append(_nights(contents))
    return views


def _last(contents: Contents) -> View:
    cards = [bars("By cell", "ratio/time"), bars("By cell", "account/exposed_us")]
    if contents.has_curves:
        cards += [lines("By length", ["length/tok_s"]), lines("By length", ["length/ratio"])]
    else:
        cards += [bars("By cell", "speed/tok_s"), bars("By cell", "account/saved_us")]
    if contents.has_histories:
        cards += _night_cards("By night")
    longest = max(len(arm) for arm in contents.arms)
    arm_px = min(max(SWEEP_COLUMNS["arm"], round(CHAR_PX * longest) + PADDING_PX), MAX_ARM_PX)
    table = _table(f"tags.sweep_id = '{contents.sweep_id}'", SWEEP_COLUMNS | {"arm": arm_px}, f"tags.`{PLACE_TAG}`")
    return View(LAST, contents.title, {**table, **chart_state(cards)})


def _nights(contents: Contents) -> View:
    table = _table(f"tags.{SERIES_TAG} = '{NIGHTS_SERIES}'", NIGHT_COLUMNS, "tags.`role`")
    return View(NIGHTS, "nights", {**table, **chart_state(_night_cards("By night"))})


def _night_cards(place: str) -> list[dict[str, Any]]:
    return [
        lines(place, ["nights/ratio"], by_time=True),
        lines(place, ["nights/base_us"], by_time=True),
        lines(place, ["nights/arm_us"], by_time=True),
        lines(place, ["nights/aa"], by_time=True),
    ]


def _table(condition: str, columns: Mapping[str, int], order: str) -> dict[str, Any]:
    names = [f"tags.`{name}`" for name in columns]
    return {
        "searchFilter": condition,
        "orderByKey": order,
        "orderByAsc": True,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": names,
        # Without an order the columns of tags stand behind all others, beyond the screen's edge.
        "columnOrder": [RUN_NAME, *names, CREATED],
        "columnWidths": {**OWN_COLUMNS, **{f"tags.`{name}`": width for name, width in columns.items()}},
        "runsHiddenMode": "SHOW_ALL",
        "groupBy": None,
        "viewMaximized": False,
        "runListHidden": False,
    }


def write_views(client: Any, experiment_id: str) -> list[View]:
    """Brings the suite's views up to date with what is published there; writes nothing that is there already. Hold the lock."""
    contents = _contents(client, experiment_id)
    if contents is None:
        return []
    views = views_of(contents)
    tags: Mapping[str, str] = client.get_experiment(experiment_id).tags
    for view in views:
        known = tags.get(f"{VIEW_TAG}{view.id}")
        if known is None or _decoded(known) != (view.name, dict(view.state)):
            client.set_experiment_tag(experiment_id, f"{VIEW_TAG}{view.id}", encoded(view, known))
    return views


def encoded(view: View, known: str | None = None) -> str:
    """The tag's value. `known`: the one that it replaces, whose date of creation it keeps."""
    created = now = round(time.time() * 1000)
    if known is not None:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            created = int(json.loads(known)["createdAt"])
    packed = base64.b64encode(zlib.compress(json.dumps(view.state).encode())).decode()
    return json.dumps({"name": view.name, "createdAt": created, "updatedAt": now, "state": f"deflate;{packed}"})


def _decoded(value: str) -> tuple[str, Any] | None:
    """Name and state; None where somebody else's words stand there."""
    try:
        envelope = json.loads(value)
        packed = envelope["state"].removeprefix("deflate;")
        return envelope["name"], json.loads(zlib.decompress(base64.b64decode(packed)))
    except (ValueError, KeyError, TypeError, AttributeError, zlib.error):
        return None


def _contents(client: Any, experiment_id: str) -> Contents | None:
    complete = f"tags.role = 'summary' AND tags.`{COMPLETE_TAG}` = 'true'"

    def newest(condition: str) -> Any:
        runs = client.search_runs([experiment_id], condition, max_results=1, order_by=["attributes.start_time DESC"])
        return runs[0] if runs else None

    last = newest(complete)
    if last is None:
        return None
    tags = last.data.tags
    roles = _roles(client, experiment_id, tags["sweep_id"])
    night = newest(f"{complete} AND tags.{SERIES_TAG} = '{NIGHTS_SERIES}'")
    return Contents(
        sweep_id=tags["sweep_id"],
        title=" ".join(filter(None, (tags["night"], tags.get(STATUS_TAG), tags["experiment"]))),
        arms=tuple(last.data.params["arms"].split(",")),
        has_curves="curve" in roles,
        has_histories="history" in roles,
        last_night=night.data.tags["sweep_id"] if night is not None else "",
    )


def _roles(client: Any, experiment_id: str, sweep_id: str) -> set[str]:
    found = set()
    for role in ("curve", "history"):
        condition = f"tags.sweep_id = '{sweep_id}' AND tags.role = '{role}'"
        if client.search_runs([experiment_id], condition, max_results=1):
            found.add(role)
    return found


def view_links(uri: str, experiment_id: str, views: Iterable[View]) -> list[tuple[str, str]]:
    """(what it shows, link), for people."""
    return [(view.name, view_link(uri, experiment_id, view.id)) for view in views]
