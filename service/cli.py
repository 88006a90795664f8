"""The command line. Heavy imports wait until a command needs them: `--help` and `list` answer at once."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, ParamSpec

import typer

from experiments.errors import UserError
from service.errors import ExitCode, InfrastructureError
from service.report.destination import refuse_unwritable

P = ParamSpec("P")
app = typer.Typer(
    name="cplab",
    help="Verdicts on how context-parallel ranks order communication and computation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

SpecArgument = Annotated[str, typer.Argument(help="A catalogue name (see `cplab list`) or a YAML path.", show_default=False)]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key, as in measurement.launches=5.")
]


def _exits(command: Callable[P, ExitCode]) -> Callable[P, None]:
    """Turns results and failures into exit codes: one line on stderr, never a traceback for what a user can mend."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            code = command(*args, **kwargs)
        except UserError as error:
            _complain("error", error)
            code = ExitCode.USER_ERROR
        except InfrastructureError as error:
            _complain("failed", error)
            code = ExitCode.INFRASTRUCTURE
        except Exception as error:  # a bug of ours, a full disk: never exit code 1, which says "regression"
            traceback.print_exc()
            _complain("failed", error)
            code = ExitCode.INFRASTRUCTURE
        raise typer.Exit(int(code))

    return run


def _complain(word: str, error: Exception) -> None:
    print(f"cplab: {word}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)


@app.command("list")
@_exits
def list_experiments() -> ExitCode:
    """The catalogue."""
    from experiments import catalogue

    for name in catalogue.names():
        print(f"{name:22s} {catalogue.about(name)}")
    return ExitCode.FINE


@app.command()
@_exits
def run(
    spec: SpecArgument,
    overrides: SetOption = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result there as JSON.")] = None,
    picture: Annotated[Path | None, typer.Option("--picture", metavar="FILE", help="Draw the ratios there (PNG, SVG).")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Say what would run; start nothing.")] = False,
) -> ExitCode:
    """Runs an experiment and prints its verdicts."""
    from experiments import catalogue

    experiment = catalogue.load(spec, overrides or [])
    if plan:
        return _plan(experiment)
    refuse_unwritable(("--json", json_file), ("--picture", picture))
    from service.report.json_report import result_json
    from service.report.terminal import print_result
    from service.run.sweep import SweepKilledError, run_sweep
    from service.store.home import open_home

    home = open_home()
    try:
        result = run_sweep(experiment, home, lambda line: print(line, flush=True))
    except SweepKilledError as killed:
        _complain("killed", Exception(killed))
        return ExitCode.INFRASTRUCTURE
    if json_file is not None:
        json_file.write_text(result_json(result))
    print_result(result)
    if picture is not None:
        from service.report.forest import draw_forest

        draw_forest(result, picture)
    _publish(home, result.sweep_id)
    return _exit_code(result)


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
    from service.run.sweep import load_result
    from service.store.records import Records
    from service.store.tracking import TrackingError, publish

    records = Records(home.records)
    try:
        published = publish(records, sweep_id, load_result(records, sweep_id), home)
    except Exception as error:  # whatever ails a tracker, the measurement stands
        known = str(error) if isinstance(error, TrackingError) else f"{type(error).__name__}: {error}"
        _complain("warning", Exception(f"not published, `cplab sync` does it later: {known}"))
        return False
    finally:
        records.close()
    print(f"records: {home.records}\nMLflow:  {published.uri}, experiment {published.experiment_id}; `cplab dashboard` shows it")
    return True


@app.command()
@_exits
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
@_exits
def dashboard(port: Annotated[int, typer.Option(help="Port on loopback.", min=1, max=65535)] = 5000) -> ExitCode:
    """Serves MLflow on loopback over what has been published."""
    from service.store.dashboard import serve
    from service.store.home import open_home

    serve(open_home(), port)
    return ExitCode.FINE


@app.command()
@_exits
def doctor() -> ExitCode:
    """Looks for what would stop a run, or spoil its numbers."""
    from service.doctor import Level, examine

    findings = examine()
    for finding in findings:
        print(f"{finding.level:8s} {finding.subject:11s} {finding.text}")
    return ExitCode.USER_ERROR if any(f.level is Level.STOP for f in findings) else ExitCode.FINE


def main() -> None:
    """The console script's entry."""
    app()
