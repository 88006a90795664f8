"""History runs: one a series, a step a night, right also when nights come late or are measured again."""

from __future__ import annotations

from typing import Any

import pytest

from service.nightly.verdict import NightStatus
from service.store import night_status
from service.store.history_runs import HISTORY_TAG
from service.store.home import Home
from service.store.judged import load_result
from service.store.night_status import publish_statuses
from service.store.records import Records
from service.store.tracking import publish
from tests.service.mlflow_runs import client_of, runs_of
from tests.service.planted_nights import nightly_spec, plant_nights, sweep_of


def histories_in(home: Home) -> dict[str, Any]:
    runs = [run for run in runs_of(home) if HISTORY_TAG in run.data.tags]
    found = {run.data.tags[HISTORY_TAG]: run for run in runs}
    assert len(found) == len(runs), "a history is there twice"
    return found


def steps_of(home: Home, run: Any, name: str = "nights/ratio") -> list[tuple[int, float]]:
    return sorted((point.step, point.value) for point in client_of(home).get_metric_history(run.info.run_id, name))


def republish(home: Home, night: str) -> None:
    records = Records(home.records)
    publish(records, sweep_of(night), load_result(records, sweep_of(night)), home)
    records.close()


def test_a_history_grows_by_a_step_a_night_and_says_what_its_last_night_is(home: Home) -> None:
    nights = plant_nights(home, nightly_spec(), [0.75, 0.70, 0.75])
    found = histories_in(home)
    assert len(found) == 2, "one for each cell's one compared arm"
    for run in found.values():
        assert [step for step, _ in steps_of(home, run)] == [1, 2, 3]
        assert run.data.metrics["nights/low"] < run.data.metrics["nights/ratio"] < run.data.metrics["nights/high"] < 1
        tags = run.data.tags
        assert (tags["role"], tags["night"], tags["sweep_id"], tags["nights"]) == (
            "history",
            nights[-1],
            sweep_of(nights[-1]),
            "3",
        )
        assert (tags["verdict"], tags["arm"], tags["rev"]) == ("FASTER", "overlapped", "0123456")
        assert run.info.status == "FINISHED"
        assert "Open: [last night](#/experiments/" in tags["mlflow.note.content"]
    before = {key: run.info.run_id for key, run in found.items()}
    republish(home, nights[0])
    assert {key: run.info.run_id for key, run in histories_in(home).items()} == before, "a repeat adds nothing"


def test_a_night_that_comes_late_finds_its_place(home: Home) -> None:
    nights = plant_nights(home, nightly_spec(), [0.75, 0.70], is_published=False)
    republish(home, nights[1])
    expected = {key: steps_of(home, run) for key, run in histories_in(home).items()}
    assert all(len(steps) == 2 for steps in expected.values()), "the records know both nights"
    client = client_of(home)
    (run, *_) = histories_in(home).values()
    client.log_metric(run.info.run_id, "nights/ratio", 9.0, step=7)  # what nobody measured
    republish(home, nights[0])
    assert {key: steps_of(home, run) for key, run in histories_in(home).items()} == expected


def test_a_sweep_that_is_no_night_has_no_history(home: Home) -> None:
    from tests.service.synthetic import make_spec, make_sweep

    records, result = make_sweep(home, make_spec())
    publish(records, result.sweep_id, result, home)
    assert histories_in(home) == {}


def test_how_nights_ended_and_what_moved_stands_on_their_runs(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    from service.history import suspect

    monkeypatch.setattr(suspect, "MIN_NIGHTS", 6)
    nights = plant_nights(home, nightly_spec(), [0.75, 0.76, 0.74, 0.75, 0.76, 0.74, 0.20], is_published=False)
    for night in (nights[0], nights[-1]):
        republish(home, night)
    client = client_of(home)
    (experiment,) = client.search_experiments(filter_string="name = 'nsa-indexer'")
    for _ in range(2):  # the second time nothing is left to do
        titles = publish_statuses(client, experiment.experiment_id, home)
    by_night = {run.data.tags["night"]: run.data.tags for run in runs_of(home) if run.data.tags["role"] == "summary"}
    assert by_night[nights[0]]["status"] == NightStatus.YOUNG
    assert by_night[nights[-1]]["status"] == NightStatus.REGRESSION
    assert titles[sweep_of(nights[-1])] == by_night[nights[-1]]["night_title"]
    for run in histories_in(home).values():
        assert run.data.tags["moved"].startswith("+")
        assert run.data.tags["moved"].endswith("03-07 code")


def test_the_nights_view_keeps_to_the_recent_ones_and_the_histories(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(night_status, "RECENT_NIGHTS", 2)
    nights = plant_nights(home, nightly_spec(), [0.75, 0.70, 0.75])
    client = client_of(home)
    (experiment,) = client.search_experiments(filter_string="name = 'nsa-indexer'")
    for _ in range(2):
        assert set(publish_statuses(client, experiment.experiment_id, home)) == {sweep_of(night) for night in nights[1:]}
    series = {run.data.tags["night"]: run.data.tags["series"] for run in runs_of(home) if run.data.tags["role"] == "summary"}
    assert series == {nights[0]: "earlier nights", nights[1]: "nights", nights[2]: "nights"}
    for run in histories_in(home).values():
        assert run.data.tags["series"] == "nights"
        assert len(client.get_metric_history(run.info.run_id, "nights/ratio")) == 3, "the curves show every night"
