"""The command line. Heavy imports wait until a command needs them: `--help` and `list` answer at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from experiments.errors import UserError
from service.calibrate import commands as calibrate
from service.errors import ExitCode
from service.exits import complain, exits
from service.nightly import commands as night
from service.nightly import housekeeping
from service.report.destination import refuse_other_than_pictures, refuse_unwritable

app = typer.Typer(
    name="cplab",
    help="Verdicts on how context-parallel ranks order communication and computation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.add_typer(calibrate.app)
app.command()(night.nightly)
app.command()(night.bless)
app.command()(housekeeping.gc)

SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key, as in measurement.launches=5.")
]


@app.command("list")
@exits
def list_experiments() -> ExitCode:
    """The catalogue."""
    from experiments import catalogue

    for name in catalogue.names():
        print(f"{name:22s} {catalogue.about(name)}")
    return ExitCode.FINE


@app.command()
@exits
def run(
    spec: Annotated[
        str | None, typer.Argument(help="A catalogue name (see `cplab list`) or a YAML path.", show_default=False)
    ] = None,
    overrides: SetOption = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result there as JSON.")] = None,
    picture: Annotated[Path | None, typer.Option("--picture", metavar="FILE", help="Draw the ratios there (PNG, SVG).")] = None,
    trace: Annotated[
        bool, typer.Option("--trace", help="Trace one more, untimed trial of every arm: for Perfetto, and as a picture.")
    ] = False,
    lanes: Annotated[Path | None, typer.Option("--lanes", metavar="FILE", help="Draw the first trace there (PNG, SVG).")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Say what would run; start nothing.")] = False,
    resume: Annotated[
        str | None, typer.Option("--resume", metavar="SWEEP", help="Go on with a sweep that was cut off, by its own spec.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait while another run has the cluster.")] = False,
) -> ExitCode:
    """Runs an experiment and prints its verdicts."""
    from experiments import catalogue

    if spec is None and (resume is None or overrides):
        raise UserError("SPEC: name one (`cplab list` shows the catalogue), or go on with a sweep by --resume SWEEP alone")
    experiment = catalogue.load(spec, overrides or []) if spec is not None else None
    if resume is not None and plan:
        raise UserError("--plan: shows a spec, not what is left of a sweep: leave out --plan or --resume")
    if plan:
        return _plan(experiment)
    refuse_unwritable(("--json", json_file), ("--picture", picture), ("--lanes", lanes))
    refuse_other_than_pictures(("--picture", picture), ("--lanes", lanes))
    from service.store.home import open_home

    home = open_home()
    resumed = _resumption(home, resume, experiment) if resume is not None else None
    measured = resumed.spec if resumed is not None else experiment
    return _measure(measured, home, json_file, picture, lanes, trace or lanes is not None, resumed=resumed, wait=wait)


def _resumption(home: Any, sweep: str, given: Any) -> Any:
    from service.run.resume import resumption
    from service.store.records import Records

    records = Records(home.records)
    try:
        return resumption(records, sweep, given)
    finally:
        records.close()


def _measure(
    experiment: Any,
    home: Any,
    json_file: Path | None,
    picture: Path | None = None,
    lanes: Path | None = None,
    trace: bool = False,
    extra_environment: dict[str, Any] | None = None,
    resumed: Any = None,
    wait: bool = False,
) -> ExitCode:
    """Runs, prints, publishes."""
    from service.report.json_report import result_json
    from service.report.terminal import print_result
    from service.run.sweep import run_sweep

    result = run_sweep(experiment, home, lambda line: print(line, flush=True), trace, extra_environment, resumed, wait)
    if json_file is not None:
        json_file.write_text(result_json(result))
    print_result(result)
    if picture is not None:
        from service.report.forest import draw_forest

        draw_forest(result, picture)
    if trace:
        _write_traces(home, result, lanes)
    _publish(home, result.sweep_id)
    return _exit_code(result)


def _write_traces(home: Any, result: Any, lanes: Path | None) -> None:
    from service.store.records import Records
    from service.store.trace_files import draw_first, write_trace_files

    records = Records(home.records)
    try:
        files = write_trace_files(home, records, result)
        if lanes is not None:
            draw_first(records, result, lanes)
    finally:
        records.close()
    where = home.traces / result.sweep_id
    print(
        f"traces:  {where}: lanes.png, and trace.json for ui.perfetto.dev"
        if files
        else "traces:  none: no cell was traced and valid"
    )


def _exit_code(result: Any) -> ExitCode:
    from experiments.names import SweepStatus

    if result.status is not SweepStatus.FINISHED:
        return ExitCode.INFRASTRUCTURE
    return ExitCode.FINE if all(cell.is_measured for cell in result.cells) else ExitCode.INVALID


def _plan(experiment: Any) -> ExitCode:
    from service.run.preview import preview
    from service.run.sweep import check

    expansion = check(experiment)
    previews = preview(experiment, expansion.cells)
    plan = experiment.measurement
    arms = ", ".join(experiment.arms)
    print(f"{experiment.name}: {len(previews)} cells, arms {arms}, {plan.launches} to {plan.last_launches} launches")
    if expansion.replay:
        r = expansion.replay
        print(
            f"replay: {r.num_requests} requests, {r.new_tokens} of {r.prompt_tokens} prompt tokens to compute, lengths x {r.scale:.4g}"
        )
    for p in previews:
        notes = f"  ({'; '.join(p.notes)})" if p.notes else ""
        print(
            f"  {p.cell.cell_id}  {p.cell.label}: {p.cell.cp_size} ranks, {p.bytes_per_rank / 2**20:.0f} MiB a rank,"
            f" {p.trials} trials, about {p.minutes:.1f} min{notes}"
        )
    print(f"about {sum(p.minutes for p in previews):.0f} minutes in all, at rough CPU rates; nothing was started")
    return ExitCode.FINE


def _publish(home: Any, sweep_id: str) -> bool:
    """Publishes from the records. A tracker that is down costs a warning: the records have everything."""
    from service.store.judged import load_result
    from service.store.records import Records
    from service.store.tracking import TrackingError, publish

    records = Records(home.records)
    try:
        published = publish(records, sweep_id, load_result(records, sweep_id), home)
    except Exception as error:  # whatever ails a tracker, the measurement stands
        known = str(error) if isinstance(error, TrackingError) else f"{type(error).__name__}: {error}"
        complain("warning", f"not published, `cplab sync` does it later: {known}")
        return False
    finally:
        records.close()
    print(f"records: {home.records}\nMLflow:  {published.uri}, experiment {published.experiment_id}; `cplab dashboard` shows it")
    return True


SweepArgument = Annotated[str, typer.Argument(help="A sweep's id, a prefix of it, or `last`.", show_default=False)]
FromMlflowOption = Annotated[bool, typer.Option("--from-mlflow", help="Read MLflow, also when the records know the sweep.")]


@app.command()
@exits
def report(
    sweep: SweepArgument,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write the page there.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result there as JSON, too.")] = None,
    from_mlflow: FromMlflowOption = False,
    layer_us: Annotated[float | None, typer.Option(help="Time of a whole layer, us: projects the savings.")] = None,
    layer_source: Annotated[str, typer.Option(help="Where that time is from: hardware, date.")] = "",
    layer_cell: Annotated[str | None, typer.Option(help="A cell of the workload and cp_size that it is for.")] = None,
    layers_in_model: Annotated[int | None, typer.Option(help="How many layers save alike.")] = None,
    ttft_ms: Annotated[float | None, typer.Option(help="Time to first token, ms.")] = None,
) -> ExitCode:
    """Writes a sweep's page: one HTML file, also while it runs, also from MLflow alone."""
    from service.judge.projection import layer_given

    refuse_unwritable(("--out", out), ("--json", json_file))
    layer = layer_given(layer_us, layer_source, layers_in_model, ttft_ms)
    from service.report.dossier import read_dossier
    from service.report.json_report import projection_values, result_json
    from service.report.page import page
    from service.store.home import open_home
    from service.store.source import open_sweep

    with open_sweep(open_home(), sweep, from_mlflow) as source:
        dossier = read_dossier(source, layer, layer_cell)
    file = out or Path(f"report-{dossier.result.sweep_id}.html")
    file.write_text(page(dossier), encoding="utf-8")
    if json_file is not None:
        projection = projection_values(layer, dossier.projections) if layer is not None else None
        json_file.write_text(result_json(dossier.result, projection), encoding="utf-8")
    print(
        f"{file.absolute()}: {dossier.result.experiment} {dossier.result.sweep_id}, {dossier.result.status}, from {dossier.read_from}"
    )
    return ExitCode.FINE


@app.command()
@exits
def compare(
    before: SweepArgument,
    after: SweepArgument,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the changes there as JSON.")] = None,
    any_hardware: Annotated[bool, typer.Option("--any-hardware", help="Also when the machines differ.")] = False,
    from_mlflow: FromMlflowOption = False,
) -> ExitCode:
    """Judges what became of every arm's ratio between two sweeps, such as two revisions. Exits with 1 when one got worse."""
    refuse_unwritable(("--json", json_file))
    from experiments.names import Verdict
    from service.judge.change import compare_sweeps
    from service.report.change_table import change_lines, changes_json
    from service.store.home import open_home
    from service.store.judged import load_judged
    from service.store.source import open_sweep

    home = open_home()
    sweeps = []
    for word in (before, after):
        with open_sweep(home, word, from_mlflow) as source:
            sweeps.append(load_judged(source.records, source.sweep_id))
    changes = compare_sweeps(*sweeps)
    from service.machine import differences, machine_of

    other_hardware = differences(*(machine_of(sweep.result.environment) for sweep in sweeps))
    if other_hardware and not any_hardware:
        raise UserError(
            f"SWEEP: other hardware ({'; '.join(other_hardware)}): with --any-hardware they are compared all the same"
        )
    print("\n".join(change_lines(changes, other_hardware)))
    if json_file is not None:
        json_file.write_text(changes_json(changes, other_hardware), encoding="utf-8")
    if changes.has(Verdict.SLOWER):
        return ExitCode.REGRESSION
    return ExitCode.FINE if all(row.change is not None for row in changes.rows) else ExitCode.INVALID


@app.command()
@exits
def reproduce(
    sweep: SweepArgument,
    cell: Annotated[str | None, typer.Option("--cell", metavar="ID", help="Only this cell of it.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result there as JSON.")] = None,
    from_mlflow: FromMlflowOption = False,
) -> ExitCode:
    """Runs the same again: the spec that the records hold, not the catalogue's."""
    refuse_unwritable(("--json", json_file))
    from service.environment import environment
    from service.run.reproduction import drift, stored_spec
    from service.store.home import open_home
    from service.store.source import open_sweep

    home = open_home()
    with open_sweep(home, sweep, from_mlflow) as source:
        sweep_id = source.sweep_id
        experiment = stored_spec(source.records, sweep_id, cell)
        then = source.records.sweep(sweep_id)["environment"]
    print(f"reproducing {sweep_id}: {experiment.name}{f', cell {cell}' if cell else ''}, spec {experiment.spec_hash}")
    for line in drift(then, environment()):
        print(f"note: not as it was: {line}")
    code = _measure(experiment, home, json_file, extra_environment={"reproduces": sweep_id})
    print(f"side by side: cplab compare {sweep_id} last")
    return code


@app.command()
@exits
def sync() -> ExitCode:
    """Publishes to MLflow what an earlier run could not."""
    from service.store.home import open_home
    from service.store.records import Records

    home = open_home()
    records = Records(home.records)
    waiting = records.unpublished(home.tracking_uri)
    records.close()
    if not waiting:
        print("nothing to publish")
    done = [_publish(home, sweep_id) for sweep_id in waiting]
    return ExitCode.FINE if all(done) else ExitCode.INFRASTRUCTURE


@app.command()
@exits
def dashboard(
    port: Annotated[int, typer.Option(help="Port on loopback.", min=1, max=65535)] = 5000,
    open_browser: Annotated[bool, typer.Option("--open", help="Open the first view in the browser.")] = False,
) -> ExitCode:
    """Serves MLflow on loopback over what has been published, and prints the links of its prepared views."""
    from service.store.dashboard import serve
    from service.store.home import open_home

    serve(open_home(), port, open_browser=open_browser)
    return ExitCode.FINE


@app.command()
@exits
def status(
    as_json: Annotated[bool, typer.Option("--json", help="As JSON on stdout.")] = False,
    as_prometheus: Annotated[bool, typer.Option("--prometheus", help="As Prometheus' text format on stdout.")] = False,
) -> ExitCode:
    """Says what runs, how far it is, and what failed last, from the records."""
    import json

    if as_json and as_prometheus:
        raise UserError("--json, --prometheus: say one of them")
    from service.prometheus import prometheus_text
    from service.status import status_lines, status_values
    from service.store.home import open_home
    from service.store.records import Records

    records = Records(open_home().records)
    try:
        if as_prometheus:
            print(prometheus_text(status_values(records)), end="")
        else:
            print(json.dumps(status_values(records), indent=2) if as_json else "\n".join(status_lines(records)))
    finally:
        records.close()
    return ExitCode.FINE


@app.command()
@exits
def unlock(
    why: Annotated[str, typer.Option("--why", help="Kept with the sweep that is ended.", show_default=False)],
    force: Annotated[bool, typer.Option("--force", help="Also a holder that is alive.")] = False,
) -> ExitCode:
    """Ends a frozen run that has the cluster of RAY_ADDRESS: kills its driver, and marks its sweep KILLED."""
    from service.run.unlocking import unlock_cluster
    from service.store.home import open_home

    print(unlock_cluster(open_home(), why, force))
    return ExitCode.FINE


@app.command()
@exits
def doctor() -> ExitCode:
    """Looks for what would stop a run, or spoil its numbers."""
    from service.doctor import examine
    from service.preflight import Level

    findings = examine()
    for finding in findings:
        print(f"{finding.level:8s} {finding.subject:11s} {finding.text}")
    return ExitCode.USER_ERROR if any(f.level is Level.STOP for f in findings) else ExitCode.FINE


def main() -> None:
    """The console script's entry."""
    app()
