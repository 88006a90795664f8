"""Takes the README's pictures of the dashboard: table, charts, nights, compare page, note. Run by hand; nothing here is collected as a test.

python tests/benchmarks/dashboard_pictures.py HOME [OUT]    HOME is a CPLAB_HOME whose last sweep is a night
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from service.store.home import Home  # noqa: E402
from tests.service.serving import SCREEN, chromium, served  # noqa: E402

SETTLED_MS = 6000
COLORS = 160


def main() -> None:
    home, out = Home(Path(sys.argv[1]).absolute()), Path(sys.argv[2] if len(sys.argv) > 2 else ROOT / "experiments" / "screens")
    out.mkdir(exist_ok=True)
    from playwright.sync_api import sync_playwright

    with served(home) as (last, nights), sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport=SCREEN)
        page.set_default_timeout(90_000)
        _take(page, last, ".ag-row", out / "table.png")
        page.locator(".ag-row[row-index='2'] a").first.click()
        page.locator("text=Show more").first.click()
        note = page.url
        target = page.locator("a", has_text="arms side by side").get_attribute("href")
        page.get_by_text("Description", exact=True).evaluate("heading => heading.scrollIntoView({block: 'start'})")
        _save(page, out / "note.png")
        _take(page, note.split("#")[0] + target, "text=Run details", out / "compare.png")
        _take(page, f"{last}&compareRunsMode=CHART", ".js-plotly-plot .scatterlayer .point", out / "charts.png")
        _take(page, f"{nights}&compareRunsMode=CHART", ".js-plotly-plot .scatterlayer .point", out / "nights.png")
        _take(page, nights, ".ag-row", out / "nights_table.png")
        browser.close()


def _take(page: Any, link: str, there: str, path: Path) -> None:
    page.goto("about:blank")  # a link that differs after its hash alone would not load the page again
    page.goto(link)
    page.wait_for_selector(there, state="attached")
    _save(page, path)


def _save(page: Any, path: Path) -> None:
    """As a PNG of few colours: the pictures travel with every clone."""
    from PIL import Image

    page.wait_for_timeout(SETTLED_MS)
    Image.open(io.BytesIO(page.screenshot())).convert("RGB").quantize(COLORS).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
