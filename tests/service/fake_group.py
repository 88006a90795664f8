"""A controller on ranks that are played: they answer at once, and fail when told to."""

from __future__ import annotations

from experiments import catalogue
from service.run.controller import Controller, Observer
from workers.messages import (
    BlockReport,
    PrepareCell,
    Prepared,
    RunBlock,
    TraceCell,
    TraceReport,
    TrialRow,
    VerifyCell,
    VerifyReport,
)

ONE_CELL = ["cells.fabric=process_group", "cells.split=zigzag"]


class FakeGroup:
    """Two ranks that answer at once, and fail when told to."""

    shares_clock = True

    def __init__(self, script):
        self.script, self.launches, self.is_closed, self.seen = script, 0, False, []

    def launch(self, *_):
        self.launches += 1
        error = self.script.get("launch")
        if error := error() if callable(error) else error:
            raise error

    def ask(self, request, timeout_s):
        assert not self.is_closed
        self.seen.append(request)
        answer = self.script.get(type(request))
        if callable(answer):
            answer = answer(request)
        if isinstance(answer, Exception):
            raise answer
        if answer is not None:
            return answer
        match request:
            case PrepareCell():
                return [Prepared(rank, 8, (2048,), "fake") for rank in range(2)]
            case VerifyCell():
                return [VerifyReport(rank, (), (1, 2), 3) for rank in range(2)]
            case RunBlock():
                rows = tuple(TrialRow(o.variant, o.row, o.step, 1.0, 0.0, 0.0, None, None, None, None) for o in request.orders)
                return [BlockReport(rank, rows, (), 1.0) for rank in range(2)]
            case TraceCell():
                return [TraceReport(rank, (), (), 0, 0) for rank in range(2)]
        raise AssertionError(request)

    def kill_ranks(self):
        pass

    def rank_map(self):
        return []

    def close(self):
        self.is_closed = True


class Watcher(Observer):
    def __init__(self):
        self.events = []

    def launched(self, task, group, launch_s):
        self.events.append(("launched", task))

    def measured(self, task, kind, reports, wall_us, shares_clock):
        self.events.append(("measured", task, kind))

    def settled(self, task, settling):
        self.events.append(("settled", task, settling))

    def traced(self, task, reports):
        self.events.append(("traced", task, reports))

    def invalid(self, task, faults):
        self.events.append(("invalid", task, faults))

    def failed(self, task, attempt, repeats):
        self.events.append(("failed", task, attempt, repeats))

    def given_up(self, cell, cause):
        self.events.append(("given up", cell, cause))

    def of(self, kind):
        return [event[1:] for event in self.events if event[0] == kind]


def controller(script=None, overrides=(), policy=None, **options):
    spec = catalogue.load("quickstart", ["measurement.launches=5", *overrides])
    groups = []

    def make_group(cp_size):
        groups.append(FakeGroup(script or {}))
        return groups[-1]

    watcher = Watcher()
    options = {"pause": lambda _: None, **options}
    made = Controller(spec, spec.expand().cells, make_group, [watcher], policy, **options)
    return made, watcher, groups


def blocks_by_launch(watcher):
    """(cells, launches) that were measured, as {launch: cell ids}."""
    found = {}
    for event in watcher.events:
        if event[0] == "measured":
            found.setdefault(event[1].launch, set()).add(event[1].cell.cell_id)
    return found
