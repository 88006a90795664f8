"""How long publishing takes: 20 cells, 2 arms, 5 launches, 16 pairs a launch. Run by hand; nothing here is collected as a test.

python tests/benchmarks/bench_tracking.py [--http] [--cells 20]
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from service.judge.results import SweepResult  # noqa: E402
from service.store.home import TRACKING_ENV_VAR, Home  # noqa: E402
from service.store.mlflow_store import configure_mlflow, open_store  # noqa: E402
from service.store.records import Records  # noqa: E402
from service.store.tracking import publish  # noqa: E402
from tests.service.synthetic import home_in, make_spec, make_sweep  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--http", action="store_true", help="publish to a real server on loopback")
    parser.add_argument("--cells", type=int, default=20)
    arguments = parser.parse_args()
    os.environ.pop(TRACKING_ENV_VAR, None)
    with tempfile.TemporaryDirectory(prefix="cplab-bench-") as folder:
        _bench(Path(folder), arguments.cells, arguments.http)


def _bench(folder: Path, num_cells: int, is_http: bool) -> None:
    home = home_in(folder / "home")
    plan = {"launches": 5, "blocks": 2, "trials_per_block": 8, "control_trials": 4}
    spec = make_spec(num_cells, measurement=plan)
    started = time.monotonic()
    sweeps = [(sweep_id, *make_sweep(home, spec, sweep_id)) for sweep_id in ("bench-1", "bench-2", "bench-3")]
    num_runs = sum(len(cell.arms) for cell in sweeps[0][2].cells)
    print(f"{num_cells} cells, {num_runs} arm runs; made in {time.monotonic() - started:.1f} s")
    configure_mlflow()
    started = time.monotonic()
    import mlflow.tracking  # noqa: F401

    print(f"import of mlflow                   {time.monotonic() - started:6.2f} s")
    if is_http:
        with _server(folder) as uri:
            os.environ[TRACKING_ENV_VAR] = uri
            _time_publishing(home, sweeps)
    else:
        started = time.monotonic()
        open_store(home, "warm-up")
        print(f"schema and first experiment        {time.monotonic() - started:6.2f} s")
        _time_publishing(home, sweeps)


def _time_publishing(home: Home, sweeps: list[tuple[str, Records, SweepResult]]) -> None:
    for sweep_id, records, result in sweeps:
        done = publish(records, sweep_id, result, home)
        print(f"publish {sweep_id}: {done.num_runs_created} runs made      {done.seconds:6.2f} s")
    sweep_id, records, result = sweeps[0]
    done = publish(records, sweep_id, result, home)
    print(f"repeat  {sweep_id}: {done.num_runs_kept} runs kept      {done.seconds:6.2f} s")


@contextmanager
def _server(folder: Path) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = time.monotonic()
    log = (folder / "server.log").open("w")
    artifacts = str(folder / "server-artifacts")
    store = ["--backend-store-uri", f"sqlite:///{folder / 'server.db'}", "--artifacts-destination", artifacts]
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", *store, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"],
        env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    try:
        uri = f"http://127.0.0.1:{port}"
        while True:
            try:
                urllib.request.urlopen(f"{uri}/health", timeout=1).close()
                break
            except OSError:
                if server.poll() is not None or time.monotonic() - started > 120:
                    raise SystemExit(f"the server did not come up: {(folder / 'server.log').read_text()[-2000:]}") from None
                time.sleep(0.1)
        print(f"server up                          {time.monotonic() - started:6.2f} s")
        yield uri
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)
        log.close()


if __name__ == "__main__":
    main()
