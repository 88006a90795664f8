"""How long the dashboard takes with 10,000 runs in its store. Run by hand; nothing here is collected as a test.

python tests/benchmarks/bench_dashboard.py [--nights 400]

One night is published; the others are copies of its rows, since publishing 10,000 runs would take longer than anything that is measured here.
"""

from __future__ import annotations

import argparse
import os
import sqlite3
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from service.store.home import TRACKING_ENV_VAR, Home  # noqa: E402
from service.store.mlflow_store import configure_mlflow  # noqa: E402
from tests.service.planted_nights import nightly_spec, plant_nights, sweep_of  # noqa: E402
from tests.service.serving import SCREEN, chromium, served  # noqa: E402
from tests.service.synthetic import home_in  # noqa: E402

DAY_MS = 86_400_000
TABLES = {"tags": "key, value", "params": "key, value", "metrics": "key, value, timestamp, step, is_nan"}
TABLES["latest_metrics"] = TABLES["metrics"]
REPEATS = 5
VISITS = 2
NAMES = ("last sweep", "nights")
ARGUMENTS = ["--no-sandbox", "--disable-gpu"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nights", type=int, default=400)
    arguments = parser.parse_args()
    os.environ.pop(TRACKING_ENV_VAR, None)
    with tempfile.TemporaryDirectory(prefix="cplab-bench-") as folder:
        home = home_in(Path(folder) / "home")
        links = ["process_group", "emulated_20mbit"]
        spec = nightly_spec(4, cells={"cp_size": 2, "split": ["zigzag", "interleave"], "fabric": links})
        (night,) = plant_nights(home, spec, [0.75])
        started = time.monotonic()
        count = _fill(home.folder / "mlflow.db", sweep_of(night), arguments.nights)
        print(f"{count} runs in the store, filled in {time.monotonic() - started:.1f} s; load {os.getloadavg()[0]:.1f}")
        _queries(home, night)
        _views(home)


def _fill(path: Path, sweep_id: str, nights: int) -> int:
    """Copies the night's runs to the nights before it, and lengthens the histories; the number of runs."""
    db = sqlite3.connect(path)
    of_sweep = "SELECT run_uuid FROM tags WHERE key='sweep_id' AND value=?"
    night_runs = (
        f"SELECT run_uuid FROM tags WHERE key='role' AND value IN ('arm', 'curve', 'summary') AND run_uuid IN ({of_sweep})"
    )
    ids = [row[0] for row in db.execute(night_runs, (sweep_id,))]
    columns = [row[1] for row in db.execute("PRAGMA table_info(runs)")]
    changed = {"run_uuid": "c.new", "start_time": "r.start_time - c.back * ?1", "end_time": "r.end_time - c.back * ?1"}
    with db:
        db.execute("CREATE TEMP TABLE copies (old TEXT, new TEXT, back INTEGER)")
        copies = [(run_id, uuid.uuid4().hex, back) for back in range(1, nights) for run_id in ids]
        db.executemany("INSERT INTO copies VALUES (?,?,?)", copies)
        values = ", ".join(changed.get(name, f"r.{name}") for name in columns)
        joined = "copies c JOIN {} r ON r.run_uuid = c.old"
        db.execute(f"INSERT INTO runs ({', '.join(columns)}) SELECT {values} FROM {joined.format('runs')}", (DAY_MS,))
        for table, names in TABLES.items():
            db.execute(f"INSERT INTO {table} (run_uuid, {names}) SELECT c.new, {names} FROM {joined.format(table)}")
        db.execute(
            "UPDATE tags SET value = value || '-' || (SELECT back FROM copies WHERE new = run_uuid) "
            "WHERE key='sweep_id' AND run_uuid IN (SELECT new FROM copies)"
        )
        histories = [row[0] for row in db.execute("SELECT run_uuid FROM tags WHERE key='role' AND value='history'")]
        for run_id in histories:
            db.executemany(
                "INSERT INTO metrics (run_uuid, key, value, timestamp, step, is_nan) "
                "SELECT run_uuid, key, value, timestamp - ?, ?, is_nan FROM latest_metrics WHERE run_uuid=?",
                [(back * DAY_MS, -back, run_id) for back in range(1, nights)],
            )
    count = int(db.execute("SELECT COUNT(*) FROM runs").fetchone()[0])
    db.close()
    return count


def _queries(home: Home, night: str) -> None:
    configure_mlflow()
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=home.tracking_uri)
    (experiment,) = client.search_experiments(filter_string="name = 'nsa-indexer'")
    suite = [experiment.experiment_id]

    def history() -> int:
        runs = client.search_runs(suite, "tags.role = 'history'")
        return sum(len(client.get_metric_history(run.info.run_id, "nights/ratio")) for run in runs)

    _print("history query: every cell's ratio over all nights", history)
    _print("first page of the nights' view", lambda: len(client.search_runs(suite, "tags.series = 'nights'", max_results=100)))
    _print(
        "the last sweep's runs",
        lambda: len(client.search_runs(suite, f"tags.sweep_id = '{sweep_of(night)}'", order_by=["tags.place ASC"])),
    )


def _views(home: Home) -> None:
    from playwright.sync_api import sync_playwright

    started = time.monotonic()
    with served(home) as links, sync_playwright() as playwright:
        print(
            f"{'cplab dashboard up, views written':52s} {time.monotonic() - started:6.2f} s; load {os.getloadavg()[0]:.1f}",
            flush=True,
        )
        browser = playwright.chromium.launch(executable_path=chromium(), args=ARGUMENTS)
        for link, name in zip(links, NAMES, strict=True):
            _report(
                name, "a new browser profile", [_open(browser.new_context(viewport=SCREEN), link) for _ in range(REPEATS + 1)]
            )
        browser.close()
        with tempfile.TemporaryDirectory(prefix="cplab-bench-profile-") as profile:
            # On disk, as a person's browser has it: what MLflow's scripts were compiled to is kept from the second visit on.
            context = playwright.chromium.launch_persistent_context(
                profile, executable_path=chromium(), args=ARGUMENTS, viewport=SCREEN
            )
            for link, name in zip(links, NAMES, strict=True):
                for _ in range(VISITS):
                    _open(context, link)
                _report(name, "a browser that was there before", [_open(context, link) for _ in range(REPEATS + 1)])
            context.close()


def _report(view: str, browser: str, seconds: list[float]) -> None:
    print(
        f"view {view}, {browser:40s} {statistics.median(seconds[1:]):6.2f} s (first {seconds[0]:.2f}, worst {max(seconds[1:]):.2f})"
    )


def _open(context: Any, link: str) -> float:
    """Seconds until the first row's columns stand in the table."""
    page = context.new_page()
    started = time.monotonic()
    page.goto(link, wait_until="commit")
    page.wait_for_selector(".ag-row[row-index='0'] [col-id='tags.`ratio`']", timeout=60_000)
    took = time.monotonic() - started
    page.close()
    return took


def _print(what: str, query: Callable[[], int], repeats: int = REPEATS) -> None:
    seconds = []
    for _ in range(repeats):
        started = time.monotonic()
        found = query()
        seconds.append(time.monotonic() - started)
    print(f"{what:52s} {statistics.median(seconds):6.2f} s (worst {max(seconds):.2f}): {found} found")


if __name__ == "__main__":
    main()
