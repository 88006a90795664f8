"""A traced cell as a Chrome trace and as a picture: what is in the spans is in both, and the picture can be read."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from dataclasses import fields, replace

import pytest

from experiments.names import Device, Part, Scope
from experiments.spec.arms import ArmSpec
from experiments.spec.measurement import VerifySpec
from experiments.spec.simulation import SimulationSpec
from experiments.spec.weights import WeightsSpec
from service.judge.results import ArmResult, CellResult, Latency
from service.report.lanes_picture import COLOURS, lanes_figure
from service.report.timeline import chrome_trace, process_id, thread_id
from tests.conftest import BOTH_ARMS, make_cell
from workers.fabrics.transport import CollectiveTransport
from workers.lanes import make_lanes
from workers.messages import ArmTrace, PrepareCell, TraceCell, TraceReport
from workers.prepared_cell import PreparedCell
from workers.traced_trial import trace_arms

LONG_GATHER = SimulationSpec()
SHORT_GATHER = SimulationSpec(gather_us=3.0)
THREE_ARMS = {**BOTH_ARMS, "mine": ArmSpec(schedule="tests.workers.mutants:overlap_again")}


def traces(cp_size=2, simulation=LONG_GATHER, arms=BOTH_ARMS, scope=Scope.QK) -> list[TraceReport]:
    """Of simulated ranks; later ranks start later, as real ones do."""
    cell = make_cell(cp_size=cp_size, device=Device.SIMULATED, scope=scope)
    reports = []
    for rank in range(cp_size):
        lanes = make_lanes(Device.SIMULATED, simulation, 10)
        lanes.stage("rope", lambda: None)
        request = PrepareCell(cell, arms, WeightsSpec(), 0, 2, VerifySpec(), simulation)
        prepared = PreparedCell(request, rank, lanes, CollectiveTransport(None, "lo"))
        reports.append(trace_arms(prepared, TraceCell(tuple(arms), 0, True)))
    return reports


def cell_of(arms=BOTH_ARMS, regime="drained", num_steps=1) -> CellResult:
    """A measured cell, as far as a picture of it asks."""

    def known(kind, **values):
        return kind(**{field.name: None for field in fields(kind)} | values)

    latency = known(Latency, p50_us=65_551.0)
    results = [known(ArmResult, arm=name, factors=arm.model_dump(mode="json"), latency=latency) for name, arm in arms.items()]
    return known(CellResult, cell={"label": "a cell", "regime": regime, "num_steps": num_steps}, arms=tuple(results), faults=())


def events_of(reports: list[TraceReport]) -> list[dict]:
    trace = json.loads(chrome_trace(reports, [f"host{r.rank}" for r in reports], {"cell": "a cell"}))
    assert trace["displayTimeUnit"] in ("ms", "ns")
    assert trace["otherData"]["cell"] == "a cell"
    assert trace["otherData"]["uncertainty_us"] == {f"rank {r.rank}": 0 for r in reports}
    return trace["traceEvents"]


def test_events_are_of_the_chrome_format():
    events = events_of(traces())
    assert {event["ph"] for event in events} == {"M", "X", "s", "f"}
    for event in events:
        assert isinstance(event["name"], str)
        assert type(event["pid"]) is type(event["tid"]) is int
        match event["ph"]:
            case "M":
                key = "sort_index" if event["name"].endswith("sort_index") else "name"
                assert set(event["args"]) == {key}
            case "X":
                assert event["ts"] >= 0
                assert event["dur"] >= 0
                assert isinstance(event["cat"], str)
                assert isinstance(event["args"], dict)
            case _:
                assert event["ts"] >= 0
                assert type(event["id"]) is int
    arrows = Counter((event["id"], event["pid"], event["ph"], event["tid"]) for event in events if event["ph"] in "sf")
    assert arrows == {(number, rank, *end): 1 for rank, number in ((100, 1), (200, 2)) for end in (("s", rank), ("f", rank + 1))}


def test_processes_are_ranks_and_threads_are_lanes():
    named = {(e["name"], e["pid"], e["tid"]): e["args"] for e in events_of(traces()) if e["ph"] == "M"}
    for rank in range(2):
        assert named["process_name", 100 * (rank + 1), 100 * (rank + 1)] == {"name": f"rank {rank} on host{rank}"}
        assert named["thread_name", 100 * (rank + 1), 100 * (rank + 1)] == {"name": "main lane"}
        assert named["thread_name", 100 * (rank + 1), 100 * (rank + 1) + 1] == {"name": "side lane"}


def test_slices_are_the_spans_and_nest():
    reports = traces(scope=Scope.INDEXER)
    slices = [event for event in events_of(reports) if event["ph"] == "X"]
    origin_ns = min(arm.start_ns for report in reports for arm in report.arms)
    spans = [(s, arm.arm) for report in reports for arm in report.arms for s in arm.spans]
    expected = Counter(
        (s.stage, arm, process_id(s.rank), thread_id(s.rank, s.lane), s.start_ns - origin_ns, s.end_ns - s.start_ns)
        for s, arm in spans
    )
    found = Counter(
        (e["name"], e["args"]["arm"], e["pid"], e["tid"], round(e["ts"] * 1e3), round(e["dur"] * 1e3))
        for e in slices
        if e["cat"] != "trial"
    )
    assert found == expected
    assert [e["name"] for e in slices if e["cat"] == "trial" and e["pid"] == process_id(0)] == list(BOTH_ARMS)
    assert len({e["tid"] for e in slices}) == 4
    for thread in {e["tid"] for e in slices}:
        ends: list[float] = []
        for e in sorted((e for e in slices if e["tid"] == thread), key=lambda e: (e["ts"], -e["dur"])):
            while ends and ends[-1] <= e["ts"] + 1e-6:
                ends.pop()
            assert not ends or e["ts"] + e["dur"] <= ends[-1] + 1e-6, f"{e['name']} crosses the end of what it began in"
            ends.append(e["ts"] + e["dur"])


def layers(reports: list[TraceReport], count: int) -> list[TraceReport]:
    """The same trials as chains: their spans again and again."""

    def repeated(arm: ArmTrace) -> ArmTrace:
        period_ns = arm.end_ns - arm.start_ns
        spans = [
            replace(span, start_ns=span.start_ns + i * period_ns, end_ns=span.end_ns + i * period_ns)
            for i in range(count)
            for span in arm.spans
        ]
        return replace(arm, end_ns=arm.start_ns + count * period_ns, spans=tuple(spans))

    return [replace(report, arms=tuple(repeated(arm) for arm in report.arms)) for report in reports]


def test_every_gather_of_a_chain_has_an_arrow_of_its_own():
    arrows = [event for event in events_of(layers(traces(), 3)) if event["ph"] in "sf"]
    assert sorted(Counter((e["id"], e["ph"]) for e in arrows)) == [(i, ph) for i in range(1, 7) for ph in "fs"]
    for start, end in _pairs(sorted(arrows, key=lambda e: (e["id"], e["ts"]))):
        assert (start["ph"], end["ph"], start["pid"]) == ("s", "f", end["pid"])
        assert end["ts"] - start["ts"] == pytest.approx(LONG_GATHER.fork_us)


def _pairs(items):
    return zip(items[::2], items[1::2], strict=True)


@pytest.mark.parametrize("simulation", [LONG_GATHER, SHORT_GATHER])
def test_the_picture_of_a_chain_can_be_read(simulation):
    figure = picture(layers(traces(simulation=simulation), 8))
    assert_readable(figure)
    panel = figure.axes[1]
    assert sum(text.get_text() == "launch" for text in panel.texts) == 2, "one for each rank"


@pytest.mark.parametrize(
    ("regime", "num_steps", "says"),
    [
        ("drained", 1, "p50 65,551 us"),
        ("streaming", 1, "p50 65,551 us a layer"),
        ("drained", 9, "p50 65,551 us over 9 steps, of which this is the longest"),
    ],
)
def test_the_picture_says_what_was_timed(regime, num_steps, says):
    figure = picture(traces(), regime=regime, num_steps=num_steps)
    assert_readable(figure)
    assert figure.axes[0].get_title("left") == f"baseline: serial\ntimed trials: {says}"


SHAPES = [
    (2, LONG_GATHER, BOTH_ARMS, Scope.QK),
    (1, SHORT_GATHER, BOTH_ARMS, Scope.INDEXER),
    (4, SHORT_GATHER, BOTH_ARMS, Scope.QK),
    (6, LONG_GATHER, THREE_ARMS, Scope.KEY_READY),
    (2, LONG_GATHER, {"baseline": ArmSpec()}, Scope.QK),
]


@pytest.mark.parametrize(("cp_size", "simulation", "arms", "scope"), SHAPES)
def test_no_words_of_the_picture_overlap(cp_size, simulation, arms, scope):
    assert_readable(picture(traces(cp_size, simulation, arms, scope), arms))


def picture(reports, arms=BOTH_ARMS, **cell):
    return lanes_figure(cell_of(arms, **cell), reports, "what was run\nwhere")


def assert_readable(figure):
    """Words lie inside the picture, and none lies over another."""
    figure.canvas.draw()
    texts = [text for axes in figure.axes if axes.get_visible() for text in _texts(axes)]
    texts += [figure._suptitle, *figure.legends[0].get_texts()]
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts if text.get_visible() and text.get_text()]
    assert len(boxes) > 15
    for (one, box), (other, another) in itertools.combinations(boxes, 2):
        assert not (box.x0 < another.x1 and another.x0 < box.x1 and box.y0 < another.y1 and another.y0 < box.y1), (one, other)
    for words, box in boxes:
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1, (
            words
        )


def _texts(axes):
    labels = [*axes.get_xticklabels(), *(axes.get_yticklabels() if axes.get_subplotspec().is_first_col() else [])]
    left, right = sorted(axes.get_xlim())
    ticks = [t for t in labels if t.axes is axes and (t not in axes.get_xticklabels() or left <= t.get_position()[0] <= right)]
    return [*ticks, axes.xaxis.label, axes.title, axes._left_title, *axes.texts]


def test_bars_are_the_spans():
    reports = traces()
    figure = picture(reports)
    for axes, arm in zip(figure.axes, BOTH_ARMS, strict=True):
        of_ranks = [next(t for t in report.arms if t.arm == arm) for report in reports]
        origin_ns = min(t.start_ns for t in of_ranks)
        expected = Counter(
            (s.stage, s.start_ns - origin_ns, s.end_ns - s.start_ns)
            for t in of_ranks
            for s in t.spans
            if s.stage not in (Part.PAD, Part.RERANGE)
        )
        bars = [(c.get_label(), bar) for c in axes.containers for bar in c.patches]
        assert Counter((stage, round(b.get_x() * 1e3), round(b.get_width() * 1e3)) for stage, b in bars) == expected
        rows = {stage: b.get_y() for stage, b in bars}
        assert (rows["gather"] < rows["rotate_q"]) == (arm == "overlapped"), "the side lane is below the main lane"


def test_every_stage_has_a_colour_of_its_own():
    stages = {s.stage for r in traces(scope=Scope.INDEXER) for arm in r.arms for s in arm.spans}
    assert stages <= set(COLOURS)
    assert len(set(COLOURS.values())) == len(COLOURS)
