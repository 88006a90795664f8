"""`cplab nightly` and `cplab bless`."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from experiments.errors import UserError
from service.errors import ExitCode
from service.exits import complain, exits
from service.report.destination import refuse_unwritable

if TYPE_CHECKING:
    from experiments.spec.experiment import ExperimentSpec
    from service.judge.results import SweepResult
    from service.store.home import Home

DEFAULT_BUDGET_MIN = 60.0


@exits
def nightly(
    spec: Annotated[str, typer.Argument(help="A catalogue name, or a YAML path.")] = "nightly",
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key: the same ones every night.")
    ] = None,
    night: Annotated[
        str | None, typer.Option(metavar="DATE", help="Its name: a date, perhaps with a suffix. Today's (UTC) by default.")
    ] = None,
    on: Annotated[
        str, typer.Option(metavar="WHEN", help="Send the webhook on `regression` (any night that is not fine), or `always`.")
    ] = "regression",
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the summary there as JSON, too.")
    ] = None,
    budget_min: Annotated[
        float, typer.Option(help="Minutes that the plan may take, by estimate; a longer one is refused.", min=0.1)
    ] = DEFAULT_BUDGET_MIN,
    again: Annotated[
        bool, typer.Option("--again", help="Measure a night that is there once more; the later one stands.")
    ] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Wait while another run has the cluster, instead of failing.")] = False,
) -> ExitCode:
    """Measures one night, reads it beside the nights before, and says what moved, since when, and who is to be asked."""
    refuse_unwritable(("--json", json_file))
    from experiments import catalogue
    from service.nightly.night import LeaseTakenError, On, check_night, hold_night, lease, tell
    from service.nightly.webhook import receiver_from
    from service.report.json_report import json_text
    from service.store.home import open_home

    if on not in set(On):
        raise UserError(f"--on: takes {' or '.join(On)}, not {on!r}")
    name = check_night(night or datetime.now(UTC).date().isoformat())
    receiver, experiment = receiver_from(), catalogue.load(spec, overrides or [])
    _refuse_long(experiment, budget_min)
    home = open_home()

    def measure(planned: ExperimentSpec, extra: Mapping[str, Any]) -> SweepResult:
        return _measure(planned, home, extra, wait)

    try:
        with lease(home):
            done = hold_night(experiment, home, name, measure, again)
            if not done.is_new:
                print(f"the night {name} of {experiment.name} is there already; --again measures it once more")
            print(done.text, end="")
            if json_file is not None:
                json_file.write_text(json_text(done.outcome.summary), encoding="utf-8")
            if done.is_new and done.outcome.sweep_id:
                _publish(home, done.outcome.sweep_id)
            if told := tell(home, done, receiver, On(on)):
                print(told)
    except LeaseTakenError as taken:
        # Not green: whoever asked this start has no night from it.
        complain("not started", taken)
        return ExitCode.INVALID
    return ExitCode(done.outcome.exit_code)


def _measure(experiment: ExperimentSpec, home: Home, extra: Mapping[str, Any], wait: bool) -> SweepResult:
    from service.report.terminal import print_result
    from service.run.sweep import run_sweep

    result = run_sweep(experiment, home, lambda line: print(line, flush=True), extra_environment=extra, wait=wait)
    print_result(result)
    return result


def _publish(home: Home, sweep_id: str) -> None:
    """Once the night is read: how it ended is part of what is published. A tracker that is down costs a warning."""
    from service.store.judged import load_result
    from service.store.records import Records
    from service.store.tracking import publish

    with contextlib.closing(Records(home.records)) as records:
        try:
            publish(records, sweep_id, load_result(records, sweep_id), home)
        except Exception as error:  # whatever ails a tracker, the night stands
            complain("warning", f"not published, `cplab sync` does it later: {type(error).__name__}: {error}")


def _refuse_long(experiment: ExperimentSpec, budget_min: float) -> None:
    from service.run.preview import preview
    from service.run.sweep import check

    minutes = sum(cell.minutes for cell in preview(experiment, check(experiment).cells))
    if minutes > budget_min:
        raise UserError(
            f"--budget-min: {experiment.name} takes about {minutes:.0f} minutes, more than {budget_min:g}: fewer cells or launches, or more minutes"
        )


@exits
def bless(
    sweep: Annotated[str, typer.Argument(help="A night's sweep: its id, a prefix of it, or `last`.", show_default=False)],
    why: Annotated[str, typer.Option(help="Why its night is the reference from now on; the log keeps it.", show_default=False)],
) -> ExitCode:
    """Accepts a night: what moved on it, or before it, is the new normal. Moves the tag of the reference, and logs who and why."""
    from service.history.blessing import bless as move
    from service.history.store import NightStore
    from service.history.tag import move_tag
    from service.store.home import open_home
    from service.store.mlflow_store import TrackingError
    from service.store.records import Records

    home = open_home()
    with contextlib.closing(Records(home.records)) as records, contextlib.closing(NightStore(home.folder)) as store:
        experiment, blessing = move(records, store, records.find(sweep), why)
        log = store.blessings(experiment)
    try:
        if not move_tag(home, experiment, blessing.sweep_id, blessing.why):
            complain("warning", f"{blessing.sweep_id} is not in MLflow: the tag there was not moved")
    except TrackingError as error:
        complain("warning", f"the tag in MLflow was not moved: {error}")
    for entry in log[:5]:
        at = datetime.fromtimestamp(entry.blessed_s, UTC).isoformat(timespec="seconds")
        print(f"{experiment} {entry.night} {entry.sweep_id} blessed {at} by {entry.who}: {entry.why}")
    return ExitCode.FINE
