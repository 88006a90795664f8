"""The dashboard in a headless Chromium, as a reviewer goes through it: the link, the verdict, a chart, the run, its report, its trace."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from service.store.view import SWEEP_COLUMNS
from tests.service.planted_nights import nightly_spec, plant_nights
from tests.service.serving import SCREEN, chromium, served
from tests.service.synthetic import home_in

pytestmark = [pytest.mark.browser, pytest.mark.timeout(400)]
PATIENCE_MS = 60_000

CUT_OFF = """
() => [...document.querySelectorAll(".ag-cell[col-id^='tags']")].filter(cell => {
  const right = document.querySelector(".ag-root").getBoundingClientRect().right, box = cell.getBoundingClientRect();
  return box.left < right && (box.right > right + 1 || cell.scrollWidth > cell.clientWidth + 1);
}).map(cell => cell.getAttribute("col-id") + ": " + cell.textContent)
"""
COLUMNS = "() => [...document.querySelectorAll('.ag-header-cell')].map(cell => cell.getAttribute('col-id'))"
DRAWN = """
() => [...document.querySelectorAll(".js-plotly-plot")].map(
  plot => plot.querySelectorAll(".barlayer .point, .scatterlayer .point, .scatterlayer .js-line").length)
"""


@pytest.fixture(scope="module")
def links(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """Two nights of four cells, served."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        home = home_in(tmp_path_factory.mktemp("home"))
        plant_nights(home, nightly_spec(4), [0.75, 0.30], is_traced=True)
    with served(home) as found:
        yield found


@pytest.fixture
def page() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    browser = chromium()
    assert browser, "no Chromium on PATH"
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox", "--disable-gpu"])
        page = opened.new_page(viewport=SCREEN)
        page.set_default_timeout(PATIENCE_MS)
        yield page
        opened.close()


def test_the_table_says_the_verdict_and_nothing_is_cut_off(links: list[str], page: Any) -> None:
    page.goto(links[0])
    page.wait_for_selector(".ag-row [col-id='tags.`rev`']")
    page.wait_for_selector("text=MLflow Assistant")  # the side panel is open
    page.wait_for_timeout(1000)  # the columns' widths come after their cells
    shown = [name for name in page.evaluate(COLUMNS) if name.startswith("tags")]
    assert shown[: len(SWEEP_COLUMNS)] == [f"tags.`{name}`" for name in SWEEP_COLUMNS]
    verdicts = page.locator(".ag-cell[col-id='tags.`verdict`']").all_text_contents()
    assert verdicts[:3] == ["4 FASTER", "BASELINE", "FASTER"]
    assert [text for text in page.evaluate(CUT_OFF) if not text.startswith("tags.`night`")] == []


@pytest.mark.parametrize("view", [0, 1], ids=["last", "nights"])
def test_no_chart_is_empty(links: list[str], page: Any, view: int) -> None:
    page.goto(f"{links[view]}&compareRunsMode=CHART")
    page.wait_for_selector(".js-plotly-plot .barlayer .point, .js-plotly-plot .scatterlayer .point", state="attached")
    # Lines fetch their points one chart after another.
    page.wait_for_function(f"() => {{ const drawn = ({DRAWN})(); return drawn.length >= 4 && drawn.every(marks => marks > 0); }}")
    assert page.locator("text=No charts in this section").count() == 0


def test_from_the_run_to_its_report_and_its_trace(links: list[str], page: Any, tmp_path: Path) -> None:
    page.goto(links[0])
    page.locator(".ag-row[row-index='0'] a").first.click()
    with page.expect_popup() as popup:
        page.locator("a[href$='/artifacts/report.html']").click()
    report = popup.value
    report.frame_locator("iframe").locator("text=Verdicts").first.wait_for(timeout=PATIENCE_MS)
    report.close()
    page.goto(links[0])
    page.locator(".ag-row[row-index='2'] a").first.click()
    page.wait_for_selector("text=The interval excludes 1: the arm is faster here.")
    page.locator("text=Show more").first.click()  # MLflow folds notes
    with page.expect_popup() as popup:
        page.locator("a[href$='/artifacts/trace.json']").click()
    popup.value.wait_for_selector("text=traceEvents", timeout=PATIENCE_MS)
    assert popup.value.url.endswith("/artifacts/trace.json")


class Clicks:
    """What a person does with the mouse, counted."""

    def __init__(self, page: Any) -> None:
        self.page, self.count = page, 0

    def on(self, locator: Any) -> None:
        locator.click()
        self.count += 1

    def to_a_run(self) -> None:
        """The first arm behind the first baseline, with its note unfolded."""
        self.on(self.page.locator(".ag-row[row-index='2'] a").first)
        self.on(self.page.locator("text=Show more").first)

    def through(self, link: str) -> Any:
        """The page that a link of a note opens."""
        with self.page.expect_popup() as popup:
            self.on(self.page.locator("a", has_text=link).first)
        return popup.value


@pytest.mark.parametrize(("link", "shows"), [("arms side by side", "Comparing 2 Runs"), ("over nights", "nights/ratio")])
def test_three_clicks_lead_from_the_table_through_a_note(links: list[str], page: Any, link: str, shows: str) -> None:
    page.goto(links[0])
    clicks = Clicks(page)
    clicks.to_a_run()
    clicks.through(link).wait_for_selector(f"text={shows}", timeout=PATIENCE_MS)
    assert clicks.count <= 3


def test_three_clicks_lead_to_two_revisions(links: list[str], page: Any) -> None:
    page.goto(links[1])
    page.wait_for_function(
        "() => document.querySelectorAll('.ag-center-cols-container .ag-row').length >= 6"
    )  # four histories, two nights
    clicks = Clicks(page)
    summaries = page.locator(".ag-center-cols-container .ag-row", has=page.locator("[col-id='tags.`status`']:not(:empty)"))
    rows = [summaries.nth(i).get_attribute("row-index") for i in range(summaries.count())][-2:]
    for row in rows:
        clicks.on(page.locator(f".ag-row[row-index='{row}'] .ag-checkbox-input").first)
    clicks.on(page.get_by_role("button", name="Compare", exact=True).first)
    page.wait_for_selector("text=Comparing 2 Runs", timeout=PATIENCE_MS)
    assert clicks.count <= 3
