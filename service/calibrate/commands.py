"""`cplab calibrate`: what the method itself errs by, on the machine at hand."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from experiments.errors import UserError
from experiments.names import Device
from service.errors import ExitCode
from service.exits import exits
from service.report.destination import refuse_unwritable

if TYPE_CHECKING:
    from experiments.spec.experiment import ExperimentSpec
    from service.calibrate.study import Plan
    from service.run.rank_group import RankGroup

app = typer.Typer(
    name="calibrate", help="Measures what the method itself errs by: false alarms, power, coverage, rivals.", no_args_is_help=True
)

OutOption = Annotated[
    Path, typer.Option("--out", metavar="FILE", help="Recordings go there, one line each; a repeat goes on where it stopped.")
]
SetOption = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the study's cell.")]
PlainOption = Annotated[bool, typer.Option("--plain", help="Ranks as plain processes of this one, without Ray.")]
FilesArgument = Annotated[
    list[Path], typer.Argument(metavar="FILE...", help="Recordings of `calibrate aa` and `calibrate power`.")
]
SeedOption = Annotated[int, typer.Option(help="Of the first comparison; the others count on.")]


@app.command()
@exits
def aa(
    out: OutOption,
    comparisons: Annotated[int, typer.Option(help="Comparisons of equal arms.", min=1)] = 200,
    loaded: Annotated[bool, typer.Option("--loaded", help="Beside a process that loads one core in bursts.")] = False,
    seed: SeedOption = 1,
    overrides: SetOption = None,
    plain: PlainOption = False,
) -> ExitCode:
    """Equal arms under two names, again and again: how often is a difference claimed?"""
    from service.calibrate.neighbour import Neighbour
    from service.calibrate.study import Plan

    plans = [Plan("aa", seed + i, 0.0, loaded) for i in range(comparisons)]
    _run(plans, out, overrides or [], plain, Neighbour(seed) if loaded else contextlib.nullcontext())
    return ExitCode.FINE


@app.command()
@exits
def power(
    out: OutOption,
    planted_pct: Annotated[float, typer.Option(help="The slow-down, per cent of the baseline's time.", min=0.01, max=100)] = 5.0,
    comparisons: Annotated[int, typer.Option(help="Comparisons.", min=1)] = 40,
    seed: SeedOption = 100_001,
    overrides: SetOption = None,
    plain: PlainOption = False,
) -> ExitCode:
    """One arm slower by a planted wait: how often is it found, and how fast?"""
    from service.calibrate.study import POWER_PLAN, Plan

    plans = [Plan("power", seed + i, planted_pct) for i in range(comparisons)]
    _run(plans, out, [*POWER_PLAN, *(overrides or [])], plain)
    return ExitCode.FINE


@app.command()
@exits
def live(
    out: OutOption,
    planted_pct: Annotated[float, typer.Option(help="The slow-down, per cent; 0 for equal versions.", min=0, max=100)] = 0.0,
    comparisons: Annotated[int, typer.Option(help="Comparisons.", min=1)] = 20,
    seed: SeedOption = 400_001,
    overrides: SetOption = None,
    plain: PlainOption = False,
) -> ExitCode:
    """Runs of one version each, in turn, as people compare them: what their rules are read on."""
    from service.calibrate.live import read_live, run_live
    from service.calibrate.study import Study, study_spec
    from service.store.home import open_home
    from service.store.records import Records

    refuse_unwritable(("--out", out))
    spec = study_spec(overrides or [], 0, 0.0)
    records = Records(open_home().calibration)
    try:
        with _group(plain, spec) as group:
            wait_us = Study(records, group, overrides or []).pilot_us() * planted_pct / 100 if planted_pct else 0.0
            done = {made.seed for made in read_live(out) if made.planted_pct == planted_pct} if out.exists() else set()
            for number in (i for i in range(comparisons) if seed + i not in done):
                made = run_live(group, study_spec(overrides or [], seed + number, wait_us), platform.node(), planted_pct)
                with out.open("a") as file:
                    file.write(made.model_dump_json() + "\n")
                said = (
                    "; ".join(f"{rule}: {word.name}" for rule, word in made.verdicts().items() if word)
                    or "no rule sees a difference"
                )
                print(f"{number + 1}/{comparisons}: {said}", flush=True)
    finally:
        records.close()
    return ExitCode.FINE


@app.command()
@exits
def coverage(
    comparisons: Annotated[int, typer.Option(help="Simulated comparisons of each noise model.", min=1)] = 2000,
    first: Annotated[int, typer.Option(help="Launches before the first look.", min=5)] = 8,
    last: Annotated[int, typer.Option(help="Most launches.", min=5)] = 20,
    effect_pct: Annotated[float, typer.Option(help="The true effect, per cent.", min=-50, max=100)] = 3.0,
) -> ExitCode:
    """Simulated noise with a known truth: how often does the interval hold it, and how wide is it?"""
    from service.calibrate.simulation import MODELS
    from service.calibrate.simulation import coverage as simulate
    from service.judge.looks import Looks

    if last < first:
        raise UserError(f"--last is {last}, fewer than --first ({first})")
    print(f"{comparisons} comparisons each, true effect {effect_pct:g} %, looks after {Looks(first, last).planned} launches")
    print("| noise | interval holds the truth | width / oracle | width / fixed-n t | launches |\n|---|---|---|---|---|")
    for name in MODELS:
        c = simulate(name, comparisons, Looks(first, last), effect_pct, indifference_pct=1.0)
        print(f"| {name} | {c.holds.words} | {c.width:.2f} | {c.width_t:.2f} | {c.launches:g} |", flush=True)
    return ExitCode.FINE


@app.command()
@exits
def fabric(
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The link model goes there, as YAML.")],
    nccl_tests: Annotated[
        Path | None, typer.Option(metavar="FILE", help="JSON of nccl-tests' all_gather_perf (-J), instead of gathers here.")
    ] = None,
    device: Annotated[Device, typer.Option(help="Where the ranks run, and whom the model is for.")] = Device.CPU,
    cp_size: Annotated[int, typer.Option(help="Ranks that gather.", min=2)] = 2,
    tokens: Annotated[str, typer.Option(help="Sizes: tokens of a step, 256 bytes each.")] = "512,2048,8192,32768",
    skew_us: Annotated[float, typer.Option(help="Measured again with the last rank that late; 0: not.", min=0)] = 0.0,
    trials: Annotated[int, typer.Option(help="Gathers of each size.", min=4)] = 40,
    link: Annotated[str, typer.Option(help="What the link is called in names (device cuda).")] = "calibrated",
    ctas: Annotated[int, typer.Option(help="CTAs of the collective (device cuda).", min=1, max=128)] = 16,
    plain: PlainOption = False,
) -> ExitCode:
    """A link model (latency and bandwidth) from real gathers: what `--set cells.fabric="$(cat FILE)"` takes."""
    from service.calibrate.fabric import fit, measure_point, points_of_nccl_tests, preset, specs_of

    refuse_unwritable(("--out", out))
    if device is Device.SIMULATED:
        raise UserError("--device simulated gathers nothing: use cpu or cuda")
    if nccl_tests is not None:
        points, words = points_of_nccl_tests(nccl_tests), [f"nccl-tests, {nccl_tests.name}"]
    else:
        try:
            sizes = [int(size) for size in tokens.split(",")]
        except ValueError:
            raise UserError(f"--tokens {tokens!r}: numbers with commas between them, such as 512,2048,8192") from None
        spec = specs_of(device, cp_size, sizes, skew_us)
        points, words = [], [f"{cp_size} {device} ranks on {platform.node()}, {trials} gathers of each size"]
        with _group(plain, spec) as group:
            group.launch(spec.measurement.launch_timeout_s, spec.measurement.gather_timeout_s, device, [])
            for cell in spec.expand().cells:
                point = measure_point(group, spec, cell, trials)
                late = f", the last rank {cell.skew_us:g} us late" if cell.skew_us else ""
                words.append(
                    f"{point.received_bytes:,} bytes: {point.wire_us:.1f} us (quarters {point.spread_us:.1f} apart){late}"
                )
                print(words[-1], flush=True)
                if not cell.skew_us:
                    points.append(point)
    model = fit(points)
    words.append(f"fits within {100 * model.misfit:.0f} %")
    out.write_text(preset(model, link, device, ctas, words))
    print(f"latency {model.latency_us:.1f} us, {model.bandwidth_mbps / 8e3:.3g} GB/s, {words[-1]}: {out}")
    return ExitCode.FINE


@app.command()
@exits
def summary(
    files: FilesArgument,
    indifference_pct: Annotated[float, typer.Option(help="The band of the rule.", min=0, max=50)] = 1.0,
    reruns: Annotated[int, typer.Option(help="Comparisons put together anew from the recorded launches.", min=0)] = 10_000,
    live_file: Annotated[Path | None, typer.Option("--live", metavar="FILE", help="Comparisons of `calibrate live`.")] = None,
) -> ExitCode:
    """Error rates, power and rivals, from recordings."""
    from service.calibrate.live import read_live
    from service.calibrate.recording import read
    from service.calibrate.tables import alarms_table, cheapest_table, live_table, power_table, rivals_table

    recordings = list(read(files))
    if not recordings:
        raise UserError("FILE: no recordings in these files")
    print(alarms_table(recordings, reruns, indifference_pct))
    print(power_table(recordings, indifference_pct))
    print(rivals_table(recordings, indifference_pct))
    print(cheapest_table(recordings, indifference_pct))
    if live_file is not None:
        print(live_table(list(read_live(live_file))))
    return ExitCode.FINE


def _run(
    plans: list[Plan],
    out: Path,
    overrides: list[str],
    plain: bool,
    beside: contextlib.AbstractContextManager[object] | None = None,
) -> None:
    """Makes the comparisons that the file does not hold yet, beside what is given."""
    from service.calibrate.recording import read, write
    from service.calibrate.study import Study, smaller_cell, study_spec
    from service.store.home import open_home
    from service.store.records import Records

    refuse_unwritable(("--out", out))
    spec = study_spec(overrides, 0, 0.0)
    new_tokens = spec.expand().cells[0].steps[0].new_tokens
    done = {(r.kind, r.seed, r.planted_pct, r.loaded) for r in read([out])} if out.exists() else set()
    left = [p for p in plans if (p.kind, p.seed, p.planted_pct, p.is_loaded) not in done]
    print(f"{len(plans) - len(left)} of {len(plans)} comparisons are in {out}")
    records = Records(open_home().calibration)
    try:
        with beside or contextlib.nullcontext(), _group(plain, spec) as group:
            study = Study(records, group, overrides)
            for number, plan in enumerate(left, 1):
                made = study.compare(plan)
                write(made, out)
                low, high = made.ratio[1:]
                print(
                    f"{number}/{len(left)}: {made.words} {made.ratio[0]:.4f} [{low:.4f}, {high:.4f}], {len(made.launches)} launches, "
                    f"{made.inside_s:.1f} s inside them, {made.starting_s:.1f} s starting them",
                    flush=True,
                )
                if number == 1 and (fewer := smaller_cell(new_tokens, made.inside_s / len(made.launches))):
                    print(
                        f"a comparison should take about 5 s: on this machine, --set workload.new_tokens={fewer} and another --out"
                    )
    finally:
        records.close()


@contextlib.contextmanager
def _group(plain: bool, spec: ExperimentSpec) -> Iterator[RankGroup]:
    from service.calibrate.study import lasting

    (cp_size,) = spec.cells.cp_size
    if plain:
        from service.run.local_ranks import local_group

        with lasting(local_group(cp_size)) as group:
            yield group
        return
    from service.run.cluster import connect, refuse_if_too_small
    from service.run.ray_ranks import ray_group

    with connect() as cluster:
        print(cluster.words)
        refuse_if_too_small(cluster, spec.expand().cells, spec.placement)
        with lasting(ray_group(cp_size, spec.placement, spec.measurement.launch_timeout_s, spec.device)) as group:
            yield group
