"""How much of a launch's time after settling is inside timed trials, and where the rest goes: from the records of a sweep.

    cplab run quickstart
    python -m tests.benchmarks.bench_duty [SWEEP]

SWEEP is the latest one by default. Seconds are the driver's, ratios are of one run.
"""

from __future__ import annotations

import argparse

from service.judge.duty import duty
from service.run.controller import SETTLED
from service.store.home import open_home
from service.store.records import Records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sweep", nargs="?")
    records = Records(open_home().records)
    sweep_id = records.find(parser.parse_args().sweep or "last")
    found = duty(records.spent(sweep_id), records.cells(sweep_id), SETTLED)
    records.close()
    total_s = sum(found.by_action.values())
    print(f"sweep {sweep_id}: {total_s:.1f} s of tasks")
    for action, seconds in sorted(found.by_action.items(), key=lambda item: -item[1]):
        print(f"  {action:14s} {seconds:7.2f} s {seconds / total_s:6.1%}{'  after settling' if action in SETTLED else ''}")
    print(f"inside trials {found.in_trials_s:.2f} s of {found.settled_s:.2f} s after settling: duty {found.share:.1%}")


if __name__ == "__main__":
    main()
