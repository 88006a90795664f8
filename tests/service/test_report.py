"""The page: says what the records say, in the reviewer's order, whatever state the sweep is in; escapes everything; needs nothing else."""

from __future__ import annotations

import base64
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from experiments.names import SweepStatus, Verdict
from experiments.spec.experiment import ExperimentSpec
from service.judge.projection import Layer
from service.report.axis import linear_axis, log_axis, points_axis, ratio_axis
from service.report.charts import forest
from service.report.dossier import read_dossier
from service.report.page import number, page
from service.report.provenance import findings
from service.report.table import counted_verdicts, counted_words
from service.store.records import Records
from service.store.source import Source
from tests.service.synthetic import home_in, make_spec, make_sweep
from workers.messages import Fault

VOID = {"meta", "br", "img", "link", "hr", "input"}
SECTIONS = ["headline", "verdicts", "forest", "speed", "account", "aa", "environment", "launches", "caveats", "reproduce"]
UNITS = re.compile(r"(us per layer|tokens/s|, tokens|, ranks|\d % interval)$")


class Page(HTMLParser):
    """A page taken apart: fails on an element that is not closed where it should be."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.labels: list[str] = []
        self.tags: set[str] = set()
        self.links: list[str] = []
        self._in_label = False
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.add(tag)
        self.ids += [values["id"]] if values.get("id") else []
        self.links += [value for name, value in attrs if name in ("src", "href", "action", "xlink:href") and value]
        assert not [name for name in values if name.startswith("on")], values
        self._in_label = (values.get("class") or "").split()[-1:] in (["axis-label"], ["y-label"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop() == tag, (tag, self.open, self.getpos())
        self._in_label = False

    def handle_data(self, data: str) -> None:
        if self._in_label and data.strip():
            self.labels.append(data.strip())


def page_of(records: Records, sweep_id: str, **changes: object) -> str:
    return page(replace(read_dossier(Source(records, sweep_id, "the test")), **changes))


def running(records: Records, sweep_id: str) -> None:
    records.connection.execute("UPDATE sweep SET status = 'RUNNING', ended_s = NULL WHERE sweep_id = ?", (sweep_id,))


def between(text: str, first: str, second: str) -> str:
    return text[text.index(f'id="{first}"') : text.index(f'id="{second}"')]


def test_a_page_says_what_was_judged_in_the_reviewers_order(tmp_path: Path) -> None:
    records, result = make_sweep(home_in(tmp_path), make_spec(4))
    text = page_of(records, result.sweep_id)
    parsed = Page(text)
    assert parsed.ids == SECTIONS
    for cell in result.cells:
        arm = cell.arms[1]
        assert arm.comparison is not None
        assert arm.tokens_per_s is not None
        assert f"{arm.comparison.ratio.estimate:.3f}" in between(text, "verdicts", "forest")
        assert f"{arm.tokens_per_s:,.0f}" in between(text, "verdicts", "forest")
        assert f"{arm.comparison.ratio.low:.3f} to {arm.comparison.ratio.high:.3f}" in between(text, "forest", "speed")
    headline = between(text, "headline", "verdicts")
    for words in ("FINISHED", "4 FASTER", "A/A quiet in 4 cells", "EMULATED link in 2 of 4 cells", "CPU ranks", "a planted CPU"):
        assert words in headline
    assert "overlapped: schedule overlap_rotate (baseline: serial)" in headline
    assert "rank 0 &rarr; planted-host" in between(text, "environment", "launches")
    assert "cplab run planted" in text[text.index('id="reproduce"') :]
    assert f"cplab reproduce {result.sweep_id}" in text


def test_a_page_needs_no_network_and_no_script(tmp_path: Path) -> None:
    records, result = make_sweep(home_in(tmp_path), make_spec(4))
    text = page_of(records, result.sweep_id, lanes_png=b"\x89PNG and so on")
    parsed = Page(text)
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & parsed.tags
    assert parsed.links == ["data:image/png;base64," + base64.b64encode(b"\x89PNG and so on").decode()]
    assert not re.search(r"url\(|@import|https?://", text)
    assert 'id="lanes"' in text


def test_every_axis_has_a_unit(tmp_path: Path) -> None:
    records, result = make_sweep(home_in(tmp_path), make_spec(4))
    labels = Page(page_of(records, result.sweep_id)).labels
    assert len(labels) == 1 + 4 + 4 + 1  # ratios, two speed panels with two axes each, four accounts, A/A
    assert not [label for label in labels if not UNITS.search(label)]


def test_an_invalid_cell_shows_no_speed(tmp_path: Path) -> None:
    records, result = make_sweep(home_in(tmp_path), make_spec(4), invalid=[2])
    bad = result.cells[2].label
    text = page_of(records, result.sweep_id)
    Page(text)
    verdicts = between(text, "verdicts", "forest")
    (own,) = [part for part in verdicts.split("<tbody>") if f">{bad}<" in part]
    assert own.count("INVALID") >= 3
    assert "rank 1 differs | in 3 rows" in own
    assert not re.search(r"\d\.\d|\d,\d", own)
    for first, second in (("speed", "account"), ("account", "aa")):
        assert bad not in between(text, first, second)
    assert f"Not drawn: overlapped {bad} (INVALID)" in text


def test_hostile_texts_are_escaped(tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script> & \"quoted\" 'too' </main>"
    records, result = make_sweep(home_in(tmp_path), make_spec(), invalid=[0])
    records.add_faults(result.sweep_id, result.cells[0].cell["cell_id"], [Fault(hostile, hostile, hostile)])
    records.fail_cell(result.sweep_id, result.cells[1].cell["cell_id"], hostile)
    records.end_sweep(result.sweep_id, SweepStatus.FAILED, hostile)
    records.connection.execute(
        "UPDATE sweep SET environment = json_set(environment, '$.cpu', ?, '$.revision', ?, '$.command', json_array('cplab', ?))",
        (hostile, hostile, hostile),
    )
    layer = Layer(100.0, hostile, 61, 300.0)
    dossier = read_dossier(Source(records, result.sweep_id, hostile), layer)
    text = page(dossier)
    assert "script" not in Page(text).tags
    assert "<script" not in text
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 8


def test_a_running_sweep_says_that_nothing_is_final(tmp_path: Path) -> None:
    records, result = make_sweep(home_in(tmp_path), make_spec(), launches=3)
    running(records, result.sweep_id)
    text = page_of(records, result.sweep_id)
    Page(text)
    headline = between(text, "headline", "verdicts")
    assert "RUNNING" in headline
    assert "nothing here is final" in headline
    assert "3 of 5 planned launches" in headline
    assert "the last block was recorded at" in headline


def test_a_sweep_that_has_just_begun_has_a_page(tmp_path: Path) -> None:
    records, result = make_sweep(home_in(tmp_path), make_spec(), launches=0)
    running(records, result.sweep_id)
    text = page_of(records, result.sweep_id)
    Page(text)
    assert "0 of 5 planned launches" in text
    assert "2 of 2 cells have no measurement yet" in text
    assert "No comparison has an interval yet" in text
    assert "No launch is in the records" in text


@pytest.mark.parametrize("launches", [1, 2])
def test_a_killed_sweep_says_so_and_why(tmp_path: Path, launches: int) -> None:
    records, result = make_sweep(home_in(tmp_path), make_spec(), launches=launches, status=SweepStatus.KILLED)
    text = page_of(records, result.sweep_id)
    Page(text)
    assert "The sweep ended KILLED" in text
    assert "ended by a planted cause" in text
    assert not re.search(r"\binf\b|\bnan\b", text)


def test_a_flagged_sweep_is_not_to_be_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.service import synthetic

    monkeypatch.setitem(synthetic.HIDDEN, "_aa", 0.5)
    records, result = make_sweep(home_in(tmp_path), make_spec())
    assert result.aa.flagged
    text = page_of(records, result.sweep_id)
    assert "Do not trust this sweep" in between(text, "headline", "verdicts")


def test_ranks_that_share_cores_are_said_to(tmp_path: Path) -> None:
    """Planted nodes have two cores."""
    cells = {"cp_size": [2, 4], "split": "interleave", "fabric": ["process_group"]}
    records, result = make_sweep(home_in(tmp_path), make_spec(2, cells=cells))
    caveats = page_of(records, result.sweep_id).partition('id="caveats"')[2]
    assert "cp_size 4: 4 ranks shared a node of 2 cores" in caveats
    assert "cp_size 2:" not in caveats


def test_one_length_and_size_need_no_chart_of_them(tmp_path: Path) -> None:
    records, result = make_sweep(home_in(tmp_path), make_spec(2))
    assert 'id="speed"' not in page_of(records, result.sweep_id)


def test_speed_over_sizes_when_there_is_one_length(tmp_path: Path) -> None:
    cells = {"cp_size": [1, 2, 4], "split": "interleave", "fabric": ["process_group"]}
    records, result = make_sweep(home_in(tmp_path), make_spec(2, cells=cells))
    speed = between(page_of(records, result.sweep_id), "speed", "account")
    assert "cp_size, ranks" in speed
    assert speed.count("<circle") == 3 * 2 + 2  # the points of two arms, and their marks in the key


def test_a_headline_qualifies_a_claim_as_its_row_does(tmp_path: Path) -> None:
    """FASTER alone is a claim of more than the band, wherever it is said."""
    _, result = make_sweep(home_in(tmp_path), make_spec(4))
    first, *others = result.cells
    unsure = replace(first, arms=tuple(replace(arm, may_be_small=arm.verdict is not None) for arm in first.arms))
    torn = replace(result, cells=(unsure, *others))
    arms = [arm for cell in torn.cells for arm in cell.arms]
    assert counted_words(arms) == "3 FASTER, 1 FASTER (maybe small)"
    assert [c.verdict for c in counted_verdicts(arms)] == [Verdict.FASTER, Verdict.FASTER], "one row of each words"
    said = "; ".join(finding.words for finding in findings(torn))
    assert "FASTER (maybe small) in 1 of " in said
    row = next(row for row in forest(torn, 1.0).rows if row.cell is unsure)
    assert row.words == "FASTER (maybe small)"


def test_the_headline_keeps_fabrics_and_regimes_apart(tmp_path: Path) -> None:
    _, result = make_sweep(home_in(tmp_path), make_spec(4), invalid=[3])
    assert [(f.arm, f.place) for f in findings(result)] == [("overlapped", "process_group"), ("overlapped", "emulated_20mbit")]
    real, emulated = findings(result)
    assert real.words.startswith("FASTER in 2 of 2 cells (time ratio 0.8")
    assert emulated.words.startswith("FASTER in 1 of 2 cells (time ratio 0.8")
    assert emulated.words.endswith("; INVALID in 1 of 2 cells")
    cells = (result.cells[0], replace(result.cells[2], cell={**result.cells[2].cell, "regime": "streaming"}))
    both = findings(replace(result, cells=cells))
    assert [f.place for f in both] == ["process_group, drained", "process_group, streaming"]


def test_panels_name_what_varies_between_them(tmp_path: Path) -> None:
    workload = {"kind": "grid", "new_tokens": [64, 128], "prefix_tokens": [0, 64]}
    records, result = make_sweep(home_in(tmp_path), make_spec(2, workload=workload))
    speed = between(page_of(records, result.sweep_id), "speed", "account")
    links = ("process_group", "emulated_20mbit")
    titles = re.findall(r"<h3>(.*?)</h3>", speed)
    assert titles == [f"prefix_tokens {prefix}, {link}" for prefix in (0, 64) for link in links]


def test_a_projection_names_its_source_and_that_it_is_small(tmp_path: Path) -> None:
    records, result = make_sweep(home_in(tmp_path), make_spec(2))
    layer = Layer(1e6, "profile of a planted layer, H200, 2026-11", 61, 5000.0)
    text = page(read_dossier(Source(records, result.sweep_id, "the test"), layer))
    Page(text)
    section = between(text, "projection", "aa")
    assert "profile of a planted layer, H200, 2026-11" in section
    assert section.count("under 1 % of a layer") == 2
    assert "Mind the mixture" in section


def test_the_pages_of_equal_records_are_equal(tmp_path: Path) -> None:
    records, result = make_sweep(home_in(tmp_path), make_spec(4))
    assert page_of(records, result.sweep_id) == page_of(records, result.sweep_id)


def test_the_spec_on_the_page_is_the_spec(tmp_path: Path) -> None:
    import html

    import yaml

    spec = make_spec()
    records, result = make_sweep(home_in(tmp_path), spec)
    block = re.findall(r"<pre>(.*?)</pre>", page_of(records, result.sweep_id), re.S)[-1]
    assert ExperimentSpec.model_validate(yaml.safe_load(html.unescape(block))) == spec


def test_axes_enclose_their_values_and_order_them() -> None:
    axis = linear_axis(0.0, 3970.0, "x")
    assert axis.place_pct(axis.low) == 0
    assert axis.place_pct(axis.high) == 100
    assert axis.low <= 0
    assert axis.high >= 3970
    assert axis.place_pct(1e9) == 100
    assert [tick.text for tick in axis.ticks][:2] == ["0", "1,000"]
    assert ratio_axis(0.62, 0.9, "x").high >= 1
    assert not ratio_axis(0.62, 0.9, "x").is_log
    wide = ratio_axis(0.2, 1.1, "x")
    assert wide.is_log
    assert [tick.text for tick in wide.ticks] == ["0.2", "0.5", "1"]
    points = points_axis([4096, 16384, 65536], "x")
    first, middle, last = (tick.place_pct for tick in points.ticks)
    assert middle - first == pytest.approx(last - middle, abs=0.01)
    assert 0 < first < 5
    assert log_axis(1, 2e6, "x").ticks[-1].text == "2M"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""),
        (0, "0"),
        (-2e-12, "0"),
        (0.0006, "0.001"),
        (0.1234, "0.123"),
        (-12.34, "\N{MINUS SIGN}12.3"),
        (12345.6, "12,346"),
        (float("inf"), "unbounded"),
    ],
)
def test_numbers_are_as_long_as_they_mean_something(value: float | None, text: str) -> None:
    assert number(value) == text
