"""A night: the lease, one sweep, its reading beside the history, the summary, and the one message."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from experiments.errors import UserError
from experiments.spec.experiment import ExperimentSpec
from service.errors import ExitCode, SweepKilledError
from service.history.nights import NIGHT, environment_differences, histories, nights_of
from service.history.store import NightStore, Outcome
from service.history.suspect import Finding, Reading, read_night
from service.judge.results import SweepResult
from service.nightly.summary import (
    NightSummary,
    findings_from,
    markdown,
    missed_nights,
    summary_values,
)
from service.nightly.verdict import EXIT_CODES, NightStatus, missing, status_of
from service.nightly.webhook import Receiver, deliver, message
from service.report.json_report import json_text
from service.store.home import Home
from service.store.records import Records

LOCK_NAME = "nightly.lock"
NIGHT_NAME = re.compile(r"\d{4}-\d{2}-\d{2}(\.[A-Za-z0-9_-]{1,32})?")
Measure = Callable[[ExperimentSpec, Mapping[str, Any]], SweepResult]
"""(spec, what to record with the environment) -> the sweep's result; runs it."""


class On(StrEnum):
    """When people are told."""

    REGRESSION = "regression"
    """Whenever a night is not fine: a regression, a move, a night that failed or is not whole."""
    ALWAYS = "always"


class LeaseTakenError(Exception):
    """Another nightly run is at work in this home."""


@dataclass(frozen=True)
class Done:
    """What came out. `is_new`: measured now, not read from an earlier start of the same night."""

    outcome: Outcome
    text: str
    is_new: bool


@contextlib.contextmanager
def lease(home: Home) -> Iterator[None]:
    """One nightly run at a time in a home; a dead one's lease is free.

    Raises:
        LeaseTakenError: One is at work.
    """
    import filelock

    lock = filelock.FileLock(home.folder / LOCK_NAME)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise LeaseTakenError(f"another nightly run is at work in {home.folder}: nothing was started") from None
    try:
        yield
    finally:
        lock.release()


def check_night(night: str) -> str:
    """The night's name, as it is.

    Raises:
        UserError: It is no date.
    """
    if not NIGHT_NAME.fullmatch(night):
        raise UserError(f"--night: takes a date, perhaps with a suffix, as in 2026-03-01 or 2026-03-01.b, not {night!r}")
    return night


def hold_night(spec: ExperimentSpec, home: Home, night: str, measure: Measure, again: bool = False) -> Done:
    """Measures and reads a night, or says what an earlier start made of it. Hold the lease.

    Args:
        again: Measure also when the night is there.
    """
    with contextlib.closing(NightStore(home.folder)) as store:
        known = store.outcome(spec.name, night)
        if known is not None and known.status != NightStatus.FAILED and not again:
            path = folder_of(home, spec.name, night) / "summary.md"
            text = path.read_text(encoding="utf-8") if path.is_file() else f"# {known.summary['title']}\n"
            return Done(known, text, is_new=False)
        result, failure, code = _measured(spec, night, measure)
        with contextlib.closing(Records(home.records)) as records:
            summary = summarise(spec, night, result, failure, code, records, store)
        values = json.loads(json_text(summary_values(summary)))
        sweep_id = result.sweep_id if result is not None else ""
        outcome = Outcome(spec.name, night, sweep_id, summary.status, int(summary.exit_code), values)
        text = markdown(summary)
        _write(folder_of(home, spec.name, night), text, values)
        store.keep_outcome(outcome)
        return Done(outcome, text, is_new=True)


def _measured(spec: ExperimentSpec, night: str, measure: Measure) -> tuple[SweepResult | None, str, ExitCode | None]:
    """The sweep, or why there is none. A night that could not be measured is told like any other, also one that somebody or a deadline ended:
    the sweep's own watch ends us some seconds after the signal, whatever we are at."""
    try:
        result = measure(spec, {NIGHT: night})
    except UserError as error:
        return None, str(error), ExitCode.USER_ERROR
    except SweepKilledError as killed:
        return None, str(killed), ExitCode.INFRASTRUCTURE
    except Exception as error:
        return None, f"{type(error).__name__}: {error}", ExitCode.INFRASTRUCTURE
    return result, result.failure, None


def summarise(
    spec: ExperimentSpec,
    night: str,
    result: SweepResult | None,
    failure: str,
    code: ExitCode | None,
    records: Records,
    store: NightStore,
) -> NightSummary:
    """Reads a measured night beside the ones before it."""
    nights = nights_of(records, spec.name, until=night)
    before = store.outcome_before(spec.name, night)
    carried = findings_from(before.summary) if before is not None else ()
    blessing = next(iter(store.blessings(spec.name)), None)
    if result is not None and nights and nights[-1].sweep_id == result.sweep_id:
        indifference = spec.measurement.indifference_pct
        reading = read_night(histories(records, store, nights), indifference, blessing.night if blessing else None, carried)
    else:
        reading = Reading(tuple(f for f in carried if f.is_worse), (), (), 0, {})
    gone = missing(result, spec) if result is not None else []
    status = status_of(result, gone, reading)
    earlier = [found.night for found in nights if found.night < night]
    return NightSummary(
        experiment=spec.name,
        night=night,
        status=status,
        exit_code=code if code is not None else EXIT_CODES[status],
        result=result,
        failure=" ".join(failure.split()),
        gone=tuple(gone),
        reading=reading,
        missed=missed_nights(night, earlier[-1] if earlier else None),
        differences=_differences(records, reading.findings),
        blessing=blessing,
        num_nights=len(nights),
    )


def _differences(records: Records, findings: tuple[Finding, ...]) -> dict[tuple[str, str], list[str]]:
    pairs = {(finding.last_good.sweep_id, finding.first_bad.sweep_id) for finding in findings}
    return {pair: environment_differences(records, *pair) for pair in pairs}


def folder_of(home: Home, experiment: str, night: str) -> Path:
    """Where a night's summary lies."""
    return home.folder / "nights" / experiment / night


def _write(folder: Path, text: str, values: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (("summary.md", text), ("summary.json", json_text(values))):
        unfinished = folder / f"{name}.unfinished"
        unfinished.write_text(content, encoding="utf-8")
        unfinished.replace(folder / name)


def tell(home: Home, done: Done, receiver: Receiver | None, on: On) -> str:
    """The night's one message, unless it was taken before; how it went in words, empty when there was nothing to say. Raises nothing of the
    receiver's."""
    outcome = done.outcome
    is_due = on is On.ALWAYS or outcome.status not in (NightStatus.FINE, NightStatus.YOUNG)
    if receiver is None or not is_due:
        return ""
    with contextlib.closing(NightStore(home.folder)) as store:
        if store.is_told(outcome.experiment, outcome.night):
            return f"{receiver.shown} has this night's message already"
        title = str(outcome.summary["title"])
        body = done.text.partition("\n\n")[2]
        key = f"cplab-{outcome.experiment}-{outcome.night}"
        delivery = deliver(receiver, message(title, body), key)
        store.keep_message(outcome.experiment, outcome.night, delivery.attempts, delivery.is_delivered)
    if delivery.is_delivered:
        return f"told {receiver.shown}"
    return f"not told: {receiver.shown} did not take it in {delivery.attempts} attempts ({delivery.reason}); starting this night again tries again"
