"""The page in a headless Chromium: nothing runs off a wide or a narrow screen, and the charts are really drawn."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from service.judge.projection import Layer
from service.report.dossier import read_dossier
from service.report.page import page
from service.store.source import Source
from tests.service.synthetic import home_in, make_spec, make_sweep

pytestmark = pytest.mark.browser

MEASURE = """
const frame = document.getElementById("page");
frame.onload = () => {
  const inner = frame.contentDocument, boxes = query => [...inner.querySelectorAll(query)].map(e => e.getBoundingClientRect());
  const charts = boxes(".plot-part > svg, .plot > svg"), marks = boxes("circle");
  document.body.dataset.found = JSON.stringify({
    width: inner.documentElement.scrollWidth,
    charts: charts.length,
    narrowest: Math.min(...charts.map(b => b.width)),
    lowest: Math.min(...charts.map(b => b.height)),
    marks: marks.length,
    off: marks.filter(b => b.left < 0 || b.right > frame.clientWidth || b.width < 5).length,
  });
};
"""


def found_in(text: str, width_px: int, folder: Path) -> dict[str, float]:
    """What the browser makes of a page in a frame of that width; a window itself cannot be so narrow."""
    browser = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
    assert browser, "no Chromium on PATH"
    frame = f'<iframe id="page" width="{width_px}" height="900" style="border:0" srcdoc="{html.escape(text)}"></iframe>'
    whole = f"<!DOCTYPE html><body>{frame}<script>{MEASURE}</script></body>"
    (folder / "frame.html").write_text(whole)
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=5000",
        "--window-size=1800,1000",
        "--dump-dom",
    ]
    uri = (folder / "frame.html").as_uri()
    done = subprocess.run([browser, *options, uri], capture_output=True, text=True, timeout=100, check=True)
    (found,) = re.findall(r'data-found="(.*?)"', done.stdout)
    return dict(json.loads(html.unescape(found)))


@pytest.mark.parametrize("width_px", [400, 1600])
def test_the_page_fits_the_screen(tmp_path: Path, width_px: int) -> None:
    spec = make_spec(
        4, arms={"baseline": {}, "overlapped": {"schedule": "overlap_rotate"}, "a_name_of_thirty_two_characters_": {}}
    )
    records, result = make_sweep(home_in(tmp_path), spec, invalid=[1])
    layer = Layer(1e5, "x" * 200, 61, 1e4)
    dossier = read_dossier(Source(records, result.sweep_id, "/a/long/path" * 20), layer, result.cells[0].cell["cell_id"])
    found = found_in(page(dossier), width_px, tmp_path)
    assert found["width"] <= width_px, "the page scrolls sideways"
    assert found["charts"] >= 10
    assert found["narrowest"] >= 200
    assert found["lowest"] >= 20
    assert found["marks"] > 10
    assert found["off"] == 0, "a mark lies off the screen"
