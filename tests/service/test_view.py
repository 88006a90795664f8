"""Prepared views: what they hold, written once, and only when something changed."""

from __future__ import annotations

import base64
import json
import zlib
from typing import Any
from urllib.parse import parse_qs, urlsplit

from service.store.charts import OTHER_SECTIONS
from service.store.home import Home
from service.store.planned_run import plan_runs
from service.store.tracking import publish
from service.store.view import CREATED, LAST, NIGHTS, RUN_NAME, SWEEP_COLUMNS, VIEW_TAG, view_link, write_views
from tests.service.mlflow_runs import client_of
from tests.service.planted_nights import nightly_spec, plant_nights, sweep_of
from tests.service.synthetic import make_spec, make_sweep

BESIDE_THE_SIDE_PANEL_PX = 938
SELECTION_PX = 73


def views_in(home: Home) -> tuple[str, dict[str, dict[str, Any]]]:
    """The suite's experiment, and id -> state of its views."""
    (experiment,) = client_of(home).search_experiments(filter_string="name = 'nsa-indexer'")
    found = {key.removeprefix(VIEW_TAG): json.loads(value) for key, value in experiment.tags.items() if key.startswith(VIEW_TAG)}
    return experiment.experiment_id, {
        key: {**json.loads(zlib.decompress(base64.b64decode(value["state"].removeprefix("deflate;")))), "name": value["name"]}
        for key, value in found.items()
    }


def test_a_published_sweep_is_the_view_of_the_suite(home: Home) -> None:
    spec = make_spec()
    records, result = make_sweep(home, spec)
    publish(records, result.sweep_id, result, home)
    experiment_id, views = views_in(home)
    assert set(views) == {LAST}, "a sweep that is no night has no nights to show"
    state = views[LAST]
    assert state["searchFilter"] == f"tags.sweep_id = '{result.sweep_id}'"
    runs = client_of(home).search_runs([experiment_id], state["searchFilter"], order_by=[f"{state['orderByKey']} ASC"])
    assert [run.data.tags["role"] for run in runs] == ["summary", *["arm"] * 4]
    assert [run.data.tags["arm"] for run in runs[1:]] == ["baseline", "overlapped"] * 2
    assert state["columnOrder"] == [RUN_NAME, *state["selectedColumns"], CREATED]
    shown = [name for name in SWEEP_COLUMNS if name != "night"]
    for run in runs:
        lacking = {name for name in SWEEP_COLUMNS if name not in run.data.tags}
        expected = {"summary": {"hidden", "tok_s"}, "arm": {"ratio", "hidden"} if run.data.tags["arm"] == "baseline" else set()}
        assert lacking <= expected[run.data.tags["role"]] | {"aa"}, run.info.run_name
    widths = state["columnWidths"]
    on_screen = SELECTION_PX + widths[RUN_NAME] + widths[CREATED] + sum(widths[f"tags.`{name}`"] for name in shown)
    assert on_screen <= BESIDE_THE_SIDE_PANEL_PX


def test_charts_are_of_metrics_that_are_there(home: Home) -> None:
    """Of one length no curve is drawn; of several, every arm's."""
    for lengths, place in ((2, "By cell"), (4, "By length")):
        spec = make_spec(lengths)
        records, result = make_sweep(home, spec, f"20260102-03040{lengths}-abcd")
        publish(records, result.sweep_id, result, home)
        experiment_id, views = views_in(home)
        runs = client_of(home).search_runs([experiment_id], views[LAST]["searchFilter"])
        metrics = {name for run in runs for name in run.data.metrics}
        cards = views[LAST]["compareRunCharts"]
        assert {card["metricKey"] for card in cards} <= metrics
        assert cards[-1]["metricSectionId"] == f"cplab-{place}"
        sections = [section["name"] for section in views[LAST]["compareRunSections"]]
        assert {name.split("/")[0] for name in metrics} <= set(sections) & set(OTHER_SECTIONS)
        assert all(len(card["metricKey"].split("/")[1]) <= 10 for card in cards), "a title would be cut"
    curves = [run for run in plan_runs(records.sweep(result.sweep_id), spec, result, {}) if run.role == "curve"]
    assert {(run.tags["arm"], run.tags["fabric"]) for run in curves} == {
        (arm, link) for arm in spec.arms for link in ("process_group", "emulated_20mbit")
    }
    assert all([step for step, _ in points] == [64, 128] for run in curves for points in run.series.values())


def test_nights_have_a_view_of_their_own(home: Home) -> None:
    nights = plant_nights(home, nightly_spec(4), [0.75, 0.75])
    experiment_id, views = views_in(home)
    assert set(views) == {LAST, NIGHTS}
    runs = client_of(home).search_runs([experiment_id], views[NIGHTS]["searchFilter"])
    assert sorted(run.data.tags["role"] for run in runs) == ["history"] * 4 + ["summary"] * 2
    assert views[LAST]["searchFilter"] == f"tags.sweep_id = '{sweep_of(nights[-1])}'"
    drawn = {card["metricKey"] for card in views[LAST]["compareRunCharts"]}
    assert {"nights/ratio", "length/tok_s", "account/exposed_us"} <= drawn


def test_nothing_is_written_twice_and_a_users_own_view_stays(home: Home) -> None:
    records, result = make_sweep(home, make_spec())
    publish(records, result.sweep_id, result, home)
    client = client_of(home)
    experiment_id, _ = views_in(home)
    client.set_experiment_tag(experiment_id, f"{VIEW_TAG}mine", "kept")
    before = client.get_experiment(experiment_id).tags
    write_views(client, experiment_id)
    assert client.get_experiment(experiment_id).tags == before
    client.set_experiment_tag(experiment_id, f"{VIEW_TAG}{LAST}", "garbage")
    write_views(client, experiment_id)
    after = client.get_experiment(experiment_id).tags
    assert json.loads(after[f"{VIEW_TAG}{LAST}"])["name"] == json.loads(before[f"{VIEW_TAG}{LAST}"])["name"]
    assert after[f"{VIEW_TAG}mine"] == "kept"


def test_a_link_says_no_more_than_which_view() -> None:
    """A filter or an order in it would void the view."""
    link = view_link("http://127.0.0.1:5000/", "7", LAST, is_chart=True)
    page, _, query = urlsplit(link).fragment.partition("?")
    assert page == "/experiments/7/runs"
    assert parse_qs(query) == {"workflowType": ["machine_learning"], "viewStateShareKey": [LAST], "compareRunsMode": ["CHART"]}
