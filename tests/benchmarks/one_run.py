"""One run of one version in an interpreter of its own, as `pytest --benchmark-only` and asv's runner make them.

    python -m tests.benchmarks.one_run --trials 10 [--wait-us 80] [--seed 1] [--set KEY=VALUE]

It prints the slowest rank's times in order, us, as JSON.
"""

from __future__ import annotations

import argparse
import json

from service.calibrate.live import times_of
from service.calibrate.recording import OTHER_ARM
from service.calibrate.study import study_spec
from service.run.local_ranks import local_group


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, required=True)
    parser.add_argument("--wait-us", type=float, default=0.0, help="of the planted slow-down")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE", help="of the study's cell")
    options = parser.parse_args()
    spec = study_spec([*options.overrides, f"measurement.trials_per_block={options.trials}"], options.seed, options.wait_us)
    plan = spec.measurement
    group = local_group(spec.cells.cp_size[0])
    try:
        group.launch(plan.launch_timeout_s, plan.gather_timeout_s, spec.device, [])
        print(json.dumps(times_of(group, spec, [OTHER_ARM], options.seed)[OTHER_ARM]))
    finally:
        group.close()


if __name__ == "__main__":
    main()
