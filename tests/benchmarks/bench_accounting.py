"""Does the account add up where nothing is faked? Over links that the kernel paces, and against planted truth on the simulated lanes.

    python -m tests.benchmarks.bench_accounting --folder DIR [--rates 20 40 80 160 320] [--tokens 2048] [--spare-cores 0] [--launches 6] [--publish]

Needs root, `ip` and `tc`, and a quiet machine for some minutes. At each rate, and once unshaped, two ranks in two network namespaces run `serial`
and `overlap_rotate` over gloo; recorded and judged as any sweep. Each has half of this process's cores, and with --spare-cores computes on
fewer: lanes that share a core contend for it, and nothing hides what the gather itself takes of it.

Of the two ranks the late one's times are checked: it gets its keys last, and the slowest in a control is the other one now and then. The
account of the slowest, as published, stands beside it. `hidden_ideal` - `hidden` is by definition (tax + contention) / G, and T(a) = ideal + tax +
contention holds whatever was measured; so what can fail is asked of figures that come from other trials:

    G is the gather     exposed(serial), from the arms' blocks, against the gather run alone, from the controls' block
    predicted           T(overlapped) against T(C_a) + max(0, gather alone - W_a) + tax, every term of it from the controls' block
    hidden is ideal     hidden_ideal - hidden, Fieller's interval of the pairs, against the tax / G that the controls know: no contention
    the link's floor    the gather alone against the least time that the token bucket allows its bytes

A check agrees when its interval over launches holds 0, and reaches at most a third of G to either side: a wider one tells nothing. The
intervals of a check hold jointly over the table's rates (Bonferroni): each of the three disagrees somewhere by chance in one table of twenty.
Arms and controls take turns, four blocks of either in a launch.

On the simulated lanes the same rates are planted, and every figure has to come out as planted. DIR gets accounting.json, accounting.png and
records.db; --publish copies the picture to experiments/.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from service.environment import environment
from service.judge.accounting import Account, AccountSummary, ArmTimes, account, summarise
from service.judge.interval import Interval, fieller_interval, mean_interval
from service.judge.results import SweepResult
from service.judge.samples import Trial
from service.report.json_report import json_text
from service.store.records import Records
from tests.benchmarks.accounting_picture import draw_accounting
from tests.benchmarks.planted_account import BYTES_PER_TOKEN, measure_simulated, planted_at, planted_figures
from tests.hosts.link import BURST_BYTES, missing_piece, shaped_link
from tests.hosts.ranks import ROOT, link_group
from tests.hosts.sweep import FEW_HEADS, ONE_LATE, make_spec, run_on

RATES_MBPS = (20.0, 40.0, 80.0, 160.0, 320.0)
TOKENS = 2048
"""256 KiB into each rank: many packets, and at every rate but the highest a gather of more than 10 ms."""
CONFIDENCE = 0.95
"""Of a figure; of a check over all rates of a table."""
TELLS = 1 / 3
"""An interval that reaches further than this share of G to either side would agree with too much: it says nothing."""
RECORDED = 1e-3
"""Records keep times to the nanosecond: what comes out as planted does so to that many us."""


@dataclass(frozen=True)
class Point:
    """One rate, us per layer. Intervals are over launches, those of the gaps joint over the table's rates; times are the late rank's.

    Attributes:
        slowest: The account as it is published, of the slowest rank of each trial.
        rate_mbps: None: unshaped.
        gather_alone_us: The control that runs the gather and nothing else.
        predicted_us: T(overlapped) from the controls alone.
        gather_gap_us: G - gather alone.
        predicted_gap_us: T(overlapped) - predicted.
        hidden_gap: hidden_ideal - hidden - tax / G; None where G is lost in noise.
        floor_us: What the bucket allows the bytes; None: unshaped.
    """

    rate_mbps: float | None
    verdict: str
    ratio: Interval
    serial_us: Interval
    account: AccountSummary
    slowest: AccountSummary
    gather_alone_us: Interval
    predicted_us: Interval
    gather_gap_us: Interval
    predicted_gap_us: Interval
    hidden_gap: Interval | None
    floor_us: float | None

    @property
    def gaps(self) -> dict[str, Interval | None]:
        """What each check holds against 0, as a share of G; None where G is lost in noise."""
        gather_us = self.account.gather_us.estimate

        def share(gap_us: Interval) -> Interval | None:
            if self.account.hidden is None:
                return None
            return Interval(gap_us.estimate / gather_us, gap_us.low / gather_us, gap_us.high / gather_us)

        return {
            "G is the gather": share(self.gather_gap_us),
            "predicted": share(self.predicted_gap_us),
            "hidden is ideal": self.hidden_gap,
        }

    @property
    def checks(self) -> dict[str, bool | None]:
        """Whether each check agrees; None where its interval is too wide to tell, or there is nothing to check."""

        def answer(gap: Interval | None) -> bool | None:
            if gap is None or gap.excludes(0):
                return None if gap is None else False
            return True if gap.high - gap.low <= 2 * TELLS else None

        told = {name: answer(gap) for name, gap in self.gaps.items()}
        return {**told, "the link's floor": None if self.floor_us is None else self.gather_alone_us.estimate >= self.floor_us}


LATE = -1
"""The rank that the skew holds back."""


def median_us(launch: Sequence[Trial], variant: str) -> float:
    """The late rank's."""
    return median(trial.elapsed_us[LATE] for trial in launch if trial.variant == variant)


def account_of(launch: Sequence[Trial]) -> Account:
    """The late rank's, in one launch of the overlapped arm."""
    window_us = median(trial.window_us[LATE] for trial in launch if trial.variant == "overlapped/prefilled")
    overlapped = ArmTimes(*(median_us(launch, f"overlapped{control}") for control in ("", "/prefilled", "/zero_byte")), window_us)
    compute_us = median_us(launch, "baseline/prefilled")
    return account(overlapped, ArmTimes(median_us(launch, "baseline"), compute_us, compute_us, 0.0))


def point_of(rate_mbps: float | None, floor_us: float | None, num_rates: int, result: SweepResult, records: Records) -> Point:
    """The checks of one rate of `num_rates`, from its records."""
    baseline, overlapped = result.cells[0].arms
    assert overlapped.account is not None and baseline.account is not None and overlapped.comparison is not None
    record = records.cell(result.sweep_id, result.cells[0].cell["cell_id"])
    numbers = sorted({trial.launch for trial in record.trials})
    launches = [[trial for trial in record.trials if trial.launch == number] for number in numbers]
    accounts = [account_of(launch) for launch in launches]
    alone_us = [median_us(launch, "baseline/gather_alone") for launch in launches]
    predicted_us = [
        a.compute_us + max(0.0, alone - a.window_us) + a.fork_join_tax_us for a, alone in zip(accounts, alone_us, strict=True)
    ]

    def over_launches(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
        return mean_interval(values, confidence)

    jointly = 1 - (1 - CONFIDENCE) / num_rates
    gaps_us = [a.coverable_us - a.covered_us - a.fork_join_tax_us for a in accounts]
    gathers_us = [a.gather_us for a in accounts]
    summary = summarise(accounts, CONFIDENCE)
    return Point(
        rate_mbps=rate_mbps,
        verdict=str(overlapped.verdict),
        ratio=overlapped.comparison.ratio,
        serial_us=over_launches([median_us(launch, "baseline") for launch in launches]),
        account=summary,
        slowest=overlapped.account,
        gather_alone_us=over_launches(alone_us),
        predicted_us=over_launches(predicted_us),
        gather_gap_us=over_launches([g - alone for g, alone in zip(gathers_us, alone_us, strict=True)], jointly),
        predicted_gap_us=over_launches([a.total_us - p for a, p in zip(accounts, predicted_us, strict=True)], jointly),
        hidden_gap=fieller_interval(gaps_us, gathers_us, jointly) if summary.hidden else None,
        floor_us=floor_us,
    )


def measure_links(
    rates_mbps: Sequence[float | None], tokens: int, spare_cores: int, measurement: dict[str, Any], records: Records
) -> list[Point]:
    """One sweep for each rate, on a link of its own."""
    points = []
    for rate_mbps in rates_mbps:
        with shaped_link(rate_mbps) as link:
            workload = {"kind": "grid", "new_tokens": [tokens]}
            spec = make_spec("accounting", measurement, dims=FEW_HEADS, cells=ONE_LATE, workload=workload)
            shaping = {"rate_mbps": rate_mbps, "burst_bytes": BURST_BYTES if rate_mbps else None, "kind": "veth pair, tc tbf"}
            result = run_on(lambda _, link=link: link_group(link, spare_cores), spec, records, shaping)
            points.append(point_of(rate_mbps, link.floor_us(tokens * BYTES_PER_TOKEN), len(rates_mbps), result, records))
    return points


def table(points: Sequence[Point]) -> str:
    """Markdown: every rate, what was measured (us per layer), and what agrees, with its gap in % of G."""

    def text(interval: Interval | None, scale: float = 1, digits: int = 0) -> str:
        if interval is None:
            return ""
        estimate, low, high = (f"{scale * value:,.{digits}f}" for value in (interval.estimate, interval.low, interval.high))
        return f"{estimate} [{low}, {high}]"

    words = {True: "yes", False: "NO", None: "not told"}

    def answer(agrees: bool | None, gap: Interval | None) -> str:
        return words[agrees] if gap is None else f"{words[agrees]}: {text(gap, 100)} %"

    headings = [
        "Mbit/s",
        "verdict",
        "ratio",
        "G us",
        "gather alone us",
        "floor us",
        "W us",
        "hidden %",
        "ideal %",
        "published: hidden %",
        "ideal %",
        "tax us",
        "contention us",
    ]
    headings += ["T(overlapped) us", "predicted us", *points[0].checks]
    lines = ["| " + " | ".join(headings) + " |", "| " + " | ".join("---" for _ in headings) + " |"]
    for p in points:
        a = p.account
        cells = [
            f"{p.rate_mbps:g}" if p.rate_mbps else "unshaped",
            p.verdict,
            text(p.ratio, digits=3),
            text(a.gather_us),
            text(p.gather_alone_us),
            f"{p.floor_us:,.0f}" if p.floor_us is not None else "",
            f"{a.window_us.estimate:,.0f}",
            text(a.hidden, 100),
            f"{100 * a.hidden_ideal.estimate:.0f}" if a.hidden_ideal else "",
            text(p.slowest.hidden, 100),
            f"{100 * p.slowest.hidden_ideal.estimate:.0f}" if p.slowest.hidden_ideal else "",
            text(a.fork_join_tax_us),
            text(a.contention_us),
            text(a.total_us),
            text(p.predicted_us),
            *(answer(agrees, p.gaps.get(name)) for name, agrees in p.checks.items()),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="gets accounting.json, accounting.png and records.db")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES_MBPS, help="Mbit/s; unshaped comes last, always")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of a step")
    parser.add_argument(
        "--spare-cores", type=int, default=0, help="of each rank's cores, how many its main lane leaves to the gather"
    )
    parser.add_argument("--launches", type=int, default=6)
    parser.add_argument(
        "--blocks", type=int, default=4, help="in a launch, each of arms and then of controls: a machine changes its pace"
    )
    parser.add_argument(
        "--trials", type=int, default=2, help="of each arm in a block; of each control as many, in whole designs (of 4)"
    )
    parser.add_argument("--publish", action="store_true", help="copy the picture to experiments/")
    options = parser.parse_args()
    if piece := missing_piece():
        sys.exit(f"a shaped link needs {piece}")
    if options.spare_cores >= (each := len(os.sched_getaffinity(0)) // 2):
        sys.exit(f"--spare-cores {options.spare_cores}: a rank has {each} of this machine's cores, and computes on at least one")
    options.folder.mkdir(parents=True, exist_ok=True)
    measurement = {
        "launches": options.launches,
        "blocks": options.blocks,
        "trials_per_block": options.trials,
        "control_trials": options.trials,
        "aa": False,  # this asks whether the account adds up, not whether a difference is one
    }
    began_s = time.monotonic()
    records = Records(options.folder / "records.db")
    try:
        simulated = measure_simulated(options.rates, records)
        points = measure_links([*options.rates, None], options.tokens, options.spare_cores, measurement, records)
    finally:
        records.close()
    picture = options.folder / "accounting.png"
    machine = environment()
    curve = {rate: planted_figures(planted_at(rate)) for rate in np.geomspace(min(options.rates), max(options.rates), 100)}
    spare = f", {options.spare_cores} of each rank's left to its gather" if options.spare_cores else ""
    place = f"{machine['cpu']}, {machine['cores']} cores{spare}\n{options.launches} launches a rate"
    draw_accounting(points, simulated, curve, place, picture)
    values = {
        "environment": machine,
        "tokens": options.tokens,
        "spare_cores": options.spare_cores,
        "measurement": measurement,
        "points": [{**asdict(p), "checks": p.checks} for p in points],
        "simulated": [asdict(p) for p in simulated],
    }
    (options.folder / "accounting.json").write_text(json_text(values))
    print(f"\n{table(points)}\n")
    for name in points[0].checks:
        answers = [p.checks[name] for p in points if p.checks[name] is not None]
        print(f"{name}: {sum(map(bool, answers))} of {len(answers)} rates agree, {len(points) - len(answers)} not told")
    if not options.spare_cores:
        print(
            "lanes that share a core contend for it: where the window is as long as the gather, what the gather takes is not hidden"
        )
    worst = max(p.worst for p in simulated)
    print(
        f"simulated: {len(simulated)} rates x {len(simulated[0].figures)} figures, largest departure from what was planted {worst:.1e}"
    )
    print(f"{time.monotonic() - began_s:.0f} s; {options.folder}/accounting.json, {picture}")
    if options.publish:
        shutil.copy(picture, ROOT / "experiments" / "accounting.png")
    if worst > RECORDED:
        sys.exit("the account does not find what was planted")


if __name__ == "__main__":
    main()
