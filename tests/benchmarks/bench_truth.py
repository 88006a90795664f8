"""Do the verdicts tell the truth? Many runs of quickstart against one long reference, and many runs of equal arms.

    python -m tests.benchmarks.bench_truth [--runs 20] [--folder DIR]

About 100 s a run in all. Results stay in DIR, and a repeat goes on where the last one stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

REFERENCE = ["--set", "cells.fabric=process_group", "--set", "measurement.launches=10", "--set", "measurement.blocks=8"]
EQUAL = [
    *("--set", "cells.fabric=process_group", "--set", "cells.split=interleave"),
    *(
        "--set",
        "arms={baseline: {schedule: serial}, red: {schedule: serial}, green: {schedule: serial}, blue: {schedule: serial}}",
    ),
]


def run(folder: Path, name: str, *changes: str) -> dict[str, Any]:
    """The result of one run of quickstart in a process of its own; read back when it is there already."""
    path = folder / f"{name}.json"
    if not path.exists():
        env = {**os.environ, "CPLAB_HOME": str(folder / "home")}
        command = [sys.executable, "-m", "service", "run", "quickstart", *changes, "--json", str(path)]
        subprocess.run(command, env=env, stdout=subprocess.DEVNULL, check=True)
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def arms(result: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(cell["label"], arm["arm"]): arm for cell in result["cells"] for arm in cell["arms"] if arm["comparison"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--folder", type=Path, default=Path(".cplab/truth"))
    parser.add_argument("--loopback", action="store_true", help="leave the emulated cells out of the runs")
    options = parser.parse_args()
    changes = ["--set", "cells.fabric=process_group"] if options.loopback else []
    options.folder.mkdir(parents=True, exist_ok=True)

    truth = {key: arm["comparison"]["ratio"] for key, arm in arms(run(options.folder, "reference", *REFERENCE)).items()}
    for (label, _), ratio in truth.items():
        print(f"reference  {label:38s} {ratio['estimate']:.4f} [{ratio['low']:.4f}, {ratio['high']:.4f}]", flush=True)
    runs = [arms(run(options.folder, f"quickstart-{i}", *changes)) for i in range(options.runs)]
    for key in runs[0]:
        ratios = [found[key]["comparison"]["ratio"] for found in runs]
        words = [found[key]["verdict"] for found in runs]
        counts = ", ".join(f"{word} {words.count(word)}" for word in sorted(set(words)))
        holds = ""
        if key in truth:
            held = sum(r["low"] <= truth[key]["estimate"] <= r["high"] for r in ratios)
            holds = f"interval contains the reference {held} of {len(runs)}; "
        widths = sorted(r["high"] - r["low"] for r in ratios)
        print(f"{key[0]:40s} {holds}{counts}; median width {widths[len(widths) // 2]:.3f}", flush=True)
        hidden = [found[key]["account"] for found in runs if found[key]["account"]["hidden"]]
        if key not in truth and hidden:
            agree = sum(a["hidden"]["low"] <= a["hidden_ideal"]["estimate"] <= a["hidden"]["high"] for a in hidden)
            mean = [sum(a[name]["estimate"] for a in hidden) / len(hidden) for name in ("hidden", "hidden_ideal")]
            print(
                f"{'':40s} hidden {mean[0]:.2f}, ideal {mean[1]:.2f} on average; ideal inside hidden's interval {agree} of {len(hidden)}"
            )

    equal = [arms(run(options.folder, f"equal-{i}", *EQUAL)) for i in range(options.runs)]
    quiet = sum(all(arm["verdict"] in ("SAME", "UNRESOLVED") for arm in found.values()) for found in equal)
    single = sum(arm["verdict"] in ("SAME", "UNRESOLVED") for found in equal for arm in found.values())
    print(f"three equal arms: all SAME or UNRESOLVED in {quiet} of {len(equal)} runs ({single} of {3 * len(equal)} verdicts)")


if __name__ == "__main__":
    main()
