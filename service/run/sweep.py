"""A sweep from spec to verdict: check everything, connect, measure, judge from the records."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from experiments.errors import SpecError, UserError
from experiments.names import Device, SweepStatus
from experiments.spec.cell import Cell
from experiments.spec.experiment import Expansion, ExperimentSpec
from service.environment import environment
from service.errors import ExitCode, SweepKilledError
from service.judge.judging import is_decided
from service.judge.results import CellRecord, SweepResult
from service.preflight import noise
from service.run.cluster import connect, refuse_if_too_small
from service.run.controller import Controller, Observer
from service.run.head import watched_head
from service.run.observers import RecordsObserver, progress
from service.run.preview import preview
from service.run.rank_group import RankGroup
from service.run.resources import refuse_what_this_machine_cannot_hold
from service.run.resume import Resumption
from service.store.claim import claimed
from service.store.home import Home
from service.store.judged import load_result, utc
from service.store.records import Records
from service.store.space import RecordsError, refuse_without_room

CLEAN_UP_S = 10.0
"""After a kill what is still alive is left to its own devices."""
_reasons: list[str] = []
"""Why this process ends itself, told before its signal comes."""


def check(spec: ExperimentSpec) -> Expansion:
    """Everything that can be wrong before anything starts.

    Raises:
        SpecError: A trace, a sequence, a user's schedule or a checkpoint that cannot be run.
    """
    expansion = spec.expand()
    user_schedules = {name: arm.schedule for name, arm in spec.arms.items() if arm.is_user_schedule}
    if user_schedules or spec.weights.checkpoint:
        # Both need torch, which a plain run's driver never loads.
        from workers.indexer.weights import checkpoint_weights
        from workers.schedules import resolve_schedule

        if str(Path.cwd()) not in sys.path:
            sys.path.insert(0, str(Path.cwd()))
        for arm, schedule in user_schedules.items():
            try:
                resolve_schedule(schedule)
            except SpecError as error:
                raise SpecError(f"arms.{arm}.{error}") from None
        if spec.weights.checkpoint and spec.device is not Device.SIMULATED:
            for layer in range(max(cell.layers for cell in expansion.cells)):
                checkpoint_weights(spec.weights.checkpoint, spec.weights.layer + layer, spec.dims)
    return expansion


def run_sweep(
    spec: ExperimentSpec,
    home: Home,
    say: Callable[[str], None],
    trace: bool = False,
    extra_environment: Mapping[str, Any] | None = None,
    resumed: Resumption | None = None,
    wait: bool = False,
) -> SweepResult:
    """Runs a spec on the cluster of this process; the result is computed from the records.

    Args:
        trace: With a traced trial of every arm.
        extra_environment: Recorded with what is found out about the machine.
        resumed: The sweep of this spec to go on with, instead of a new one.
        wait: While another run has the shared cluster.

    Raises:
        UserError: Something that the user can mend; nothing was started.
        InfrastructureError: The cluster did not give what it has.
    """
    expansion = check(spec)
    refuse_what_this_machine_cannot_hold(expansion.cells, spec.placement, spec.measurement.inputs)
    refuse_without_room(home.folder, spec, preview(spec, expansion.cells))
    records = Records(home.records)
    findings = [asdict(finding) for finding in noise()]  # before Ray's own processes are among them
    try:
        with connect() as cluster, contextlib.ExitStack() as held:
            say(cluster.words)
            refuse_if_too_small(cluster, expansion.cells, spec.placement)
            import ray

            from service.run.lease import Heartbeats, lease
            from service.run.ray_ranks import ray_group

            def make_group(cp_size: int) -> RankGroup:
                return ray_group(cp_size, spec.placement, spec.measurement.launch_timeout_s, spec.device)

            sweep_id = resumed.sweep_id if resumed else new_sweep_id()
            observers: list[Observer] = []
            if not cluster.is_own:  # nobody else can reach one of our own
                keeper = held.enter_context(lease(sweep_id, spec.name, str(home.folder), wait, say))
                observers.append(Heartbeats(keeper, spec.measurement))
            held.enter_context(watched_head(ray.get_runtime_context().gcs_address, partial(_head_lost, home, sweep_id)))
            extra = {"cluster": asdict(cluster), "preflight": findings, **(extra_environment or {})}
            measure(
                *(spec, expansion, records, make_group, say, extra, [str(Path.cwd())], trace),
                resumed=resumed,
                sweep_id=sweep_id,
                observers=observers,
            )
        return load_result(records, sweep_id)
    finally:
        records.close()


def measure(
    spec: ExperimentSpec,
    expansion: Expansion,
    records: Records,
    make_group: Callable[[int], RankGroup],
    say: Callable[[str], None],
    extra_environment: dict[str, Any],
    import_paths: list[str],
    trace: bool = False,
    watch: Callable[[int], AbstractContextManager[Observer]] = progress,
    resumed: Resumption | None = None,
    sweep_id: str = "",
    observers: Sequence[Observer] = (),
) -> str:
    """Measures every cell on groups from `make_group`, into the records; the sweep's id.

    Args:
        watch: Makes who shows the progress.
        resumed: The sweep to go on with; what it has ended stays as it is.
        sweep_id: Of a new sweep; made up when it is empty.
        observers: Further ones.

    Raises:
        SweepKilledError: The sweep is marked KILLED, and what was measured is kept.
        UserError: Another driver writes this sweep; or ranks found what the user can mend before anything was measured.
    """
    sweep_id = resumed.sweep_id if resumed else sweep_id or new_sweep_id()
    with claimed(records.path, sweep_id):
        plan, found = spec.measurement, {**environment(), **extra_environment}
        if resumed is None:
            records.start_sweep(sweep_id, spec, expansion.cells, found, replay_json(expansion))
        else:
            records.reopen(sweep_id, {"at": utc(time.time()), **found})
        launches = f"{plan.launches}" if plan.last_launches == plan.launches else f"{plan.launches} to {plan.last_launches}"
        kept = f", {len(resumed.done)} of their launches kept" if resumed else ""
        say(f"sweep {sweep_id}: {spec.name}, {len(expansion.cells)} cells x {len(spec.arms)} arms x {launches} launches{kept}")
        num_comparisons = len(expansion.cells) * (len(spec.arms) - 1)

        def decided(cells: Sequence[Cell], launches: int) -> list[Cell]:
            return [
                c for c in cells if is_decided(first_launches(records.cell(sweep_id, c.cell_id), launches), spec, num_comparisons)
            ]

        controller = Controller(
            spec,
            expansion.cells,
            make_group,
            [RecordsObserver(records, sweep_id), *observers],
            import_paths=import_paths,
            decided=decided,
            trace=trace,
            done=resumed.done if resumed else (),
            invalid=resumed.invalid if resumed else (),
            spent_s=resumed.spent_s if resumed else 0.0,
        )
        try:
            with _signals_raise(), watch(len(controller.tasks)) as watcher:
                controller.add_observer(watcher)
                controller.run()
        except SweepKilledError as killed:
            # Ray follows a SIGTERM with a SIGKILL three seconds later: the record first, then the clean-up.
            _end(records, sweep_id, SweepStatus.KILLED, str(killed))
            raise
        except BaseException as error:
            _end(records, sweep_id, SweepStatus.FAILED, f"{type(error).__name__}: {error}")
            raise
        finally:
            controller.close()
        failure = controller.failure or given_up_words(controller.given_up, len(expansion.cells))
        records.end_sweep(sweep_id, SweepStatus.FAILED if failure else SweepStatus.FINISHED, failure)
        if controller.refusal:
            raise UserError(controller.refusal)
    return sweep_id


def _head_lost(home: Home, sweep_id: str, words: str) -> None:
    """Called from another thread: the main one may be stuck in a call to Ray for good."""
    _reasons.append(words)
    records = Records(home.records)
    try:
        _end(records, sweep_id, SweepStatus.KILLED, words)
    finally:
        records.close()


def _end(records: Records, sweep_id: str, status: SweepStatus, failure: str) -> None:
    """Where the disk is full even that cannot be written: the sweep then looks like one whose driver died, and is resumed like one."""
    with contextlib.suppress(RecordsError):
        records.end_sweep(sweep_id, status, failure)


def first_launches(record: CellRecord, launches: int) -> CellRecord:
    """What a look after so many launches reads: a sweep that was resumed may hold more."""
    return replace(record, trials=[trial for trial in record.trials if trial.launch < launches])


def given_up_words(given_up: Mapping[str, str], num_cells: int) -> str:
    """One line; empty when nothing was given up."""
    if not given_up:
        return ""
    causes = "; ".join(f"{label}: {' '.join(cause.split())}" for label, cause in given_up.items())
    return f"gave up {len(given_up)} of {num_cells} cells: {causes}"


def new_sweep_id() -> str:
    """Sorts by start; two of one second differ."""
    return f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(2)}"


def replay_json(expansion: Expansion) -> dict[str, Any] | None:
    """What a replay says of itself, without its steps."""
    if expansion.replay is None:
        return None
    values = asdict(expansion.replay)
    values.pop("steps")
    return dict(json.loads(json.dumps(values)))


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
    """SIGTERM and SIGINT end the sweep at the next bytecode of the main thread."""

    def kill(number: int, _: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        # A signal to the whole process group ends Ray's own servers too, and its client then waits a minute for them.
        last_word = threading.Timer(CLEAN_UP_S, os._exit, (ExitCode.INFRASTRUCTURE,))
        last_word.daemon = True
        last_word.start()
        raise SweepKilledError(_reasons.pop() if _reasons else f"ended by {signal.Signals(number).name}")

    before = {number: signal.signal(number, kill) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
