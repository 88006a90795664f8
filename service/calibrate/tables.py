"""Recordings as Markdown tables."""

from __future__ import annotations

from collections.abc import Sequence

from service.calibrate.cheapest import MIN_DECISIONS, cheapest
from service.calibrate.error_rates import Rate, false_alarms, power_curve, rerun
from service.calibrate.live import LiveComparison
from service.calibrate.recording import Recording
from service.calibrate.rivals import Said, compare_rivals

PLANTED_PCT = 5.0
"""The effect that the rivals have to find."""


def alarms_table(recordings: Sequence[Recording], reruns: int, indifference_pct: float) -> str:
    """False alarms, quiet and beside a neighbour, as judged when measured and with the rule run again."""
    lines = ["| A/A comparisons | interval excludes 1 | FASTER or SLOWER, clear of the band | SAME |", "|---|---|---|---|"]
    for words, is_loaded in (("quiet", False), ("beside a neighbour", True)):
        equal = [r for r in recordings if r.kind == "aa" and r.loaded is is_loaded]
        if not equal:
            continue
        rows = [(words, false_alarms(equal, indifference_pct))]
        if reruns:
            rows.append(
                (
                    f"{words}, rule run again on the recorded launches (bounds: of the drawing alone)",
                    rerun(equal, reruns, indifference_pct),
                )
            )
        lines += [f"| {name} | {found.excluding.words} | {found.claims.words} | {found.same.words} |" for name, found in rows]
    return "\n".join(lines) + "\n"


def power_table(recordings: Sequence[Recording], indifference_pct: float) -> str:
    """What was found of what was planted."""
    points = power_curve([r for r in recordings if r.kind == "power"], indifference_pct)
    lines = [
        "| planted | found (SLOWER) | clear of the band | interval holds the planted ratio | smallest effect to be seen "
        "| launches | inside them | starting them |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {p.planted_pct:g} % | {p.found.words} | {p.clear.words} | {p.covered.words} | {p.detectable_pct:.2f} % "
        f"| {p.launches:g} | {p.inside_s:.1f} s | {p.starting_s:.1f} s |"
        for p in points
    ]
    return "\n".join(lines) + "\n"


def rivals_table(recordings: Sequence[Recording], indifference_pct: float) -> str:
    """The service's rule beside what people use, on the same quiet samples."""
    equal, slower = _of_rivals(recordings)
    if not equal or not slower:
        return f"no table of rivals: it takes quiet A/A recordings ({len(equal)}) and such with {PLANTED_PCT:g} % planted ({len(slower)})\n"
    lines = [
        f"| rule | false alarms | {PLANTED_PCT:g} % found (slower) | launches | seconds of trials |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.name} | {row.false_alarms.words} | {row.found.words} | {row.launches:.1f} | {row.trials_s:.2f} |"
        for row in compare_rivals(equal, slower, indifference_pct)
    ]
    return "\n".join(lines) + "\n"


def cheapest_table(recordings: Sequence[Recording], indifference_pct: float) -> str:
    """What each rule needs at its best."""
    equal, slower = ([r for r in group if len(r.looks.planned) == 1] for group in _of_rivals(recordings))
    if not equal or not slower:
        return (
            f"no table of best plans: it takes quiet A/A recordings ({len(equal)}) and such with {PLANTED_PCT:g} % planted ({len(slower)}) whose "
            "number of launches was fixed: --set measurement.launches=20 --set measurement.max_launches=20\n"
        )
    lines = [
        f"| false alarms at most | rule | its best plan | false alarms | {PLANTED_PCT:g} % found | launches | seconds of trials | times CP Lab's |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in (found := cheapest(equal, slower, indifference_pct)):
        if row.best is None:
            lines.append(f"| {row.limit:.0%} | {row.name} | none that has {MIN_DECISIONS} decisions cries so seldom | | | | | |")
            continue
        own = next(other for other in found if other.limit == row.limit)
        times = "does not resolve it"
        if row.resolves and own.best is not None and own.resolves:
            times = f"{row.best.trials_s / own.best.trials_s:.1f}"
        lines.append(
            f"| {row.limit:.0%} | {row.name} | {row.best.name} | {row.best.false_alarms.words} | {row.best.found.words} "
            f"| {row.best.launches:.1f} | {row.best.trials_s:.2f} | {times} |"
        )
    return "\n".join(lines) + "\n"


def _of_rivals(recordings: Sequence[Recording]) -> tuple[list[Recording], list[Recording]]:
    """Quiet A/A recordings, and those with the slow-down that rivals have to find."""
    equal = [r for r in recordings if r.kind == "aa" and not r.loaded]
    return equal, [r for r in recordings if r.kind == "power" and r.planted_pct == PLANTED_PCT]


def live_table(comparisons: Sequence[LiveComparison]) -> str:
    """What the rivals said of live runs: of equal versions, and of such with a planted slow-down."""
    names = list(comparisons[0].verdicts()) if comparisons else []
    groups = sorted({c.planted_pct for c in comparisons})
    heads = [f"live, {pct:g} % planted" if pct else "live, equal versions" for pct in groups]
    lines = [f"| rule | {' | '.join(heads)} |", f"|---|{'---|' * len(groups)}"]
    for name in names:
        of = [
            [
                c.verdicts()[name] is Said.SLOWER if pct else c.verdicts()[name] is not Said.NOTHING
                for c in comparisons
                if c.planted_pct == pct
            ]
            for pct in groups
        ]
        lines.append(f"| {name} | {' | '.join(Rate(sum(said), len(said)).words for said in of)} |")
    return "\n".join(lines) + "\n"
