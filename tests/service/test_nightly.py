"""The nightly run over real records: what a night comes to, what it says, how it ends, and that starting it twice is safe."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import mlflow
import pytest
from typer.testing import CliRunner

from experiments import catalogue
from experiments.errors import UserError
from experiments.names import SweepStatus
from experiments.spec.experiment import ExperimentSpec
from service.cli import app
from service.errors import ExitCode, InfrastructureError, SweepKilledError
from service.history.blessing import bless
from service.history.nights import environment_differences, nights_of
from service.history.store import NightStore, Outcome
from service.history.suspect import MIN_NIGHTS
from service.judge.results import SweepResult
from service.nightly import commands
from service.nightly.night import Done, hold_night, lease
from service.nightly.overdue import overdue
from service.nightly.summary import missed_nights
from service.nightly.verdict import NightStatus
from service.store.home import HOME_ENV_VAR, TRACKING_ENV_VAR, Home
from service.store.records import Records
from tests.service import synthetic
from tests.service.synthetic import home_in, make_spec, make_sweep


def name_of(night: int) -> str:
    return f"2026-01-{night:02d}"


class Suite:
    """A planted experiment, night after night."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.home, self.spec, self._patch = home_in(folder), make_spec(), monkeypatch
        self.measured = 0

    def plant(self, **hidden: float) -> None:
        """Shares of the gather that arms hide from now on."""
        for arm, share in hidden.items():
            self._patch.setitem(synthetic.HIDDEN, arm, share)

    def slow(self, factor: float) -> None:
        """A machine that is slower for every arm alike from now on."""
        for name in ("GATHER_US", "COMPUTE_US"):
            self._patch.setattr(synthetic, name, getattr(synthetic, name) * factor)

    def environment(self, **values: Any) -> None:
        for name, value in values.items():
            self._patch.setitem(synthetic.ENVIRONMENT, name, value)

    def measure(self, **more: Any) -> Callable[[ExperimentSpec, Mapping[str, Any]], SweepResult]:
        def run(spec: ExperimentSpec, extra: Mapping[str, Any]) -> SweepResult:
            self.measured += 1
            self.environment(**extra)
            records, result = make_sweep(self.home, spec, f"20260101-0000{self.measured:02d}-abcd", **more)
            records.close()
            return result

        return run

    def night(self, night: int, again: bool = False, **more: Any) -> Done:
        return hold_night(self.spec, self.home, name_of(night), self.measure(**more), again)

    def quiet(self, nights: int = MIN_NIGHTS) -> list[Done]:
        return [self.night(n + 1) for n in range(nights)]


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Suite:
    monkeypatch.setenv(HOME_ENV_VAR, str(tmp_path))
    monkeypatch.delenv(TRACKING_ENV_VAR, raising=False)
    return Suite(tmp_path, monkeypatch)


def status(done: Done) -> tuple[str, int]:
    return done.outcome.status, done.outcome.exit_code


def test_first_nights_are_young_and_then_fine(suite: Suite) -> None:
    assert [status(done) for done in suite.quiet(8)] == [(NightStatus.YOUNG, 0)] * (MIN_NIGHTS - 1) + [(NightStatus.FINE, 0)] * 2


def test_a_regression_names_its_night_revision_and_suspect_and_stays(suite: Suite) -> None:
    suite.quiet()
    suite.plant(overlapped=0.3)
    suite.environment(revision="fedcba9876543210fedcba9876543210fedcba98", source_digest="fedcba987654")
    first, second = suite.night(8), suite.night(9)
    for done in (first, second):
        assert status(done) == (NightStatus.REGRESSION, ExitCode.REGRESSION)
        found = done.outcome.summary["findings"]
        assert {f["suspect"] for f in found} == {"code"}
        assert {f["first_bad"]["night"] for f in found} == {name_of(8)}
        assert {f["last_good"]["night"] for f in found} == {name_of(7)}
        assert all(9 < f["ratio"]["pct"] < 13 for f in found)
        assert "revision was 0123456789abcdef" in done.text
    assert [f["nights"] for f in second.outcome.summary["findings"]] == [2, 2]
    suite.plant(overlapped=0.75)
    assert status(suite.night(10))[1] == ExitCode.FINE


def test_a_blessed_night_is_the_new_normal_and_the_log_says_why(suite: Suite) -> None:
    suite.quiet()
    suite.plant(overlapped=0.3)
    suite.night(8)
    with contextlib.closing(Records(suite.home.records)) as records, contextlib.closing(NightStore(suite.home.folder)) as store:
        with pytest.raises(UserError, match="--why"):
            bless(records, store, records.find("last"), "  ")
        bless(records, store, records.find("20260101-000001"), "the first")
        bless(records, store, records.find("last"), "slower, and right at last")
        assert [entry.why for entry in store.blessings("planted")] == ["slower, and right at last", "the first"]
    done = suite.night(9)
    assert status(done) == (NightStatus.FINE, ExitCode.FINE)
    assert "slower, and right at last" in done.text


def test_only_a_finished_night_can_be_blessed(suite: Suite) -> None:
    records, result = make_sweep(suite.home, suite.spec)
    with contextlib.closing(NightStore(suite.home.folder)) as store:
        with pytest.raises(UserError, match="is no night"):
            bless(records, store, result.sweep_id, "because")
        suite.night(1, status=SweepStatus.FAILED)
        with pytest.raises(UserError, match="did not finish"):
            bless(records, store, records.find("last"), "because")
    records.close()


def test_a_slower_machine_is_environment_and_fails_nothing(suite: Suite) -> None:
    suite.quiet()
    suite.slow(1.3)
    suite.environment(kernel="6.1")
    done = suite.night(8)
    assert status(done) == (NightStatus.MOVED, ExitCode.FINE)
    (found,) = done.outcome.summary["findings"]
    assert (found["suspect"], found["ratio"]) == ("environment", None)
    assert found["baseline"]["pct"] == pytest.approx(30, abs=2)
    assert "the ratios held" in done.text


def test_a_ratio_that_moved_with_the_machine_is_not_green_and_blames_nobody(suite: Suite) -> None:
    suite.quiet()
    suite.slow(1.3)
    suite.plant(overlapped=0.3)
    done = suite.night(8)
    assert status(done) == (NightStatus.UNTRUSTED, ExitCode.INVALID)
    assert {f["suspect"] for f in done.outcome.summary["findings"]} == {"environment"}


def test_an_aa_pair_that_moved_is_not_to_be_trusted(suite: Suite) -> None:
    suite.quiet()
    suite.plant(_aa=0.5)
    assert status(suite.night(8)) == (NightStatus.UNTRUSTED, ExitCode.INVALID)


def test_another_machine_begins_anew(suite: Suite) -> None:
    suite.quiet()
    suite.environment(cpu="a faster CPU")
    suite.plant(overlapped=0.3)
    assert status(suite.night(8)) == (NightStatus.YOUNG, ExitCode.FINE)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"launches": 3}, (NightStatus.PARTIAL, ExitCode.INVALID)),
        ({"launches": 0}, (NightStatus.PARTIAL, ExitCode.INVALID)),
        ({"invalid": [0]}, (NightStatus.PARTIAL, ExitCode.INVALID)),
        ({"status": SweepStatus.FAILED}, (NightStatus.FAILED, ExitCode.INFRASTRUCTURE)),
    ],
)
def test_an_empty_or_partial_night_is_never_green(suite: Suite, more: dict[str, Any], expected: tuple[str, int]) -> None:
    assert status(suite.night(1, **more)) == expected


def test_a_regression_is_not_forgotten_over_a_night_that_failed(suite: Suite) -> None:
    suite.quiet()
    suite.plant(overlapped=0.3)
    suite.night(8)
    failed = suite.night(9, status=SweepStatus.FAILED)
    assert status(failed) == (NightStatus.FAILED, ExitCode.INFRASTRUCTURE)
    assert failed.outcome.summary["findings"]
    found = suite.night(10).outcome.summary["findings"]
    assert {f["first_bad"]["night"] for f in found} == {name_of(8)}


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InfrastructureError("no node came"), 4),
        (UserError("SPEC: not on this machine"), 2),
        (OSError("disk"), 4),
        (SweepKilledError("ended by SIGTERM"), 4),
    ],
)
def test_a_night_that_could_not_be_measured_is_told_too(suite: Suite, error: BaseException, code: int) -> None:
    def fails(spec: ExperimentSpec, extra: Mapping[str, Any]) -> SweepResult:
        raise error

    done = hold_night(suite.spec, suite.home, name_of(1), fails)
    assert status(done) == (NightStatus.FAILED, code)
    assert str(error) in done.text
    assert status(suite.night(1)) == (NightStatus.YOUNG, 0), "a failed night may be started again"


def test_a_second_start_measures_nothing_unless_asked(suite: Suite) -> None:
    suite.quiet()
    suite.plant(overlapped=0.3)
    first = suite.night(8)
    second = suite.night(8)
    assert (second.is_new, suite.measured, second.text) == (False, 8, first.text)
    assert status(second) == (NightStatus.REGRESSION, ExitCode.REGRESSION)
    suite.plant(overlapped=0.75)
    third = suite.night(8, again=True)
    assert (third.is_new, suite.measured, status(third)) == (True, 9, (NightStatus.FINE, ExitCode.FINE))
    with contextlib.closing(Records(suite.home.records)) as records:
        assert len(nights_of(records, "planted")) == 8, "the later one stands for the night"


def test_points_are_worked_out_once(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    suite.quiet(2)
    worked: list[str] = []
    from service.history import nights

    original = nights.load_judged
    monkeypatch.setattr(nights, "load_judged", lambda records, sweep: worked.append(sweep) or original(records, sweep))
    suite.night(3)
    assert len(worked) == 1


def test_a_sweep_that_is_no_night_is_none(suite: Suite) -> None:
    suite.quiet(1)
    synthetic.ENVIRONMENT.pop("night")
    make_sweep(suite.home, suite.spec)[0].close()
    with contextlib.closing(Records(suite.home.records)) as records:
        assert [found.night for found in nights_of(records, "planted")] == [name_of(1)]


def test_environments_are_told_apart_in_words(suite: Suite) -> None:
    suite.night(1)
    suite.environment(preflight=[{"level": "warning", "subject": "neighbour", "text": "stress at 90 %"}], load_1min=1.9)
    suite.night(2)
    with contextlib.closing(Records(suite.home.records)) as records:
        first, second = (found.sweep_id for found in nights_of(records, "planted"))
        words = environment_differences(records, first, second)
        assert environment_differences(records, first, first) == []
    assert any("stress at 90 %" in word for word in words)
    assert any("load before it began" in word for word in words)


def test_a_missed_night_is_visible(suite: Suite) -> None:
    assert missed_nights("2026-03-02", "2026-02-27") == ("2026-02-28", "2026-03-01")
    assert missed_nights("2026-03-02", "2026-03-01") == missed_nights("2026-03-02.b", "2026-03-02") == ()
    assert len(missed_nights("2026-03-02", "2025-03-02")) == 7
    suite.night(1)
    assert "MISSED: no night of 2026-01-02" in suite.night(3).text


def test_nights_that_stopped_coming_are_seen_by_whoever_looks(suite: Suite) -> None:
    assert overdue(suite.home, date(2026, 1, 9)) == []
    with contextlib.closing(NightStore(suite.home.folder)) as store:
        for night in (1, 3, 4):
            store.keep_outcome(Outcome("planted", name_of(night), "", "FINE", 0, {}))
        store.keep_outcome(Outcome("once", name_of(2), "", "FINE", 0, {}))
    assert overdue(suite.home, date(2026, 1, 5)) == [], "the night of today may still come"
    (line,) = overdue(suite.home, date(2026, 1, 7))
    assert "no night of planted for 2 days: the last was 2026-01-04 (FINE)" in line
    assert overdue(suite.home, date(2026, 3, 1)) == [], "it rests"


def test_the_summary_is_there_as_markdown_and_json(suite: Suite) -> None:
    done = suite.quiet()[-1]
    folder = suite.home.folder / "nights" / "planted" / name_of(MIN_NIGHTS)
    assert (folder / "summary.md").read_text(encoding="utf-8") == done.text
    saved = json.loads((folder / "summary.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert saved == done.outcome.summary
    assert saved["status"] == "FINE" and saved["num_judged"] == 2 and saved["exit_code"] == 0


# The command.


@pytest.fixture
def command(suite: Suite, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """`cplab nightly` on the planted experiment."""
    spec_file = tmp_path / "planted.yaml"
    spec_file.write_text(json.dumps(json.loads(suite.spec.model_dump_json(exclude_none=True))), encoding="utf-8")
    monkeypatch.setattr(catalogue, "load", lambda *_: suite.spec)
    monkeypatch.setattr(commands, "_measure", lambda planned, home, extra, wait: suite.measure()(planned, extra))
    return lambda *words: CliRunner().invoke(app, ["nightly", str(spec_file), *words])


def test_the_command_ends_as_the_night_did(suite: Suite, command: Callable[..., Any], tmp_path: Path) -> None:
    suite.quiet()
    suite.plant(overlapped=0.3)
    done = command("--night", name_of(8), "--json", str(tmp_path / "night.json"))
    assert done.exit_code == ExitCode.REGRESSION
    assert "REGRESSION" in done.stdout.splitlines()[0]
    assert json.loads((tmp_path / "night.json").read_text())["status"] == "REGRESSION"
    assert published_statuses(suite) == ["REGRESSION"]
    again = command("--night", name_of(8))
    assert again.exit_code == ExitCode.REGRESSION
    assert "is there already" in again.output


def published_statuses(suite: Suite) -> list[str]:
    """Of the nights in MLflow."""
    client = mlflow.MlflowClient(suite.home.tracking_uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return [run.data.tags["status"] for run in client.search_runs(experiments, "tags.role = 'summary'")]


def test_a_second_start_beside_the_first_starts_nothing_and_is_not_green(suite: Suite, command: Callable[..., Any]) -> None:
    with lease(suite.home):
        done = command()
    assert (done.exit_code, suite.measured) == (ExitCode.INVALID, 0)
    assert "another nightly run is at work" in done.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--night", "tonight"], "takes a date"),
        (["--on", "never"], "regression or always"),
        (["--budget-min", "0.1", "--night", "2026-01-01"], "minutes, more than 0.1"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(
    suite: Suite, command: Callable[..., Any], words: list[str], says: str
) -> None:
    if "--budget-min" in words:
        suite.spec = make_spec(measurement={"launches": 500, "blocks": 10, "trials_per_block": 200})
    done = command(*words)
    assert (done.exit_code, suite.measured) == (ExitCode.USER_ERROR, 0)
    assert says in done.stderr


def test_bless_moves_the_tag_in_mlflow(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.tracking import MlflowClient

    from service.store.tracking import publish

    monkeypatch.setenv(HOME_ENV_VAR, str(home.folder))
    monkeypatch.setitem(synthetic.ENVIRONMENT, "night", name_of(1))
    sweeps = ["20260101-000001-aaaa", "20260102-000001-bbbb", "20260103-000001-cccc"]
    for i, sweep_id in enumerate(sweeps):
        synthetic.ENVIRONMENT["night"] = name_of(i + 1)
        records, result = make_sweep(home, make_spec(), sweep_id)
        if i < 2:
            publish(records, sweep_id, result, home)
        records.close()
    for sweep_id in sweeps[:2]:
        assert CliRunner().invoke(app, ["bless", sweep_id, "--why", "looked at"]).exit_code == ExitCode.FINE
        client = MlflowClient(tracking_uri=home.tracking_uri)
        suites = [found.experiment_id for found in client.search_experiments()]
        tagged = client.search_runs(suites, "tags.blessed = 'true'")
        assert [run.data.tags["sweep_id"] for run in tagged] == [sweep_id]
    done = CliRunner().invoke(app, ["bless", sweeps[2], "--why", "never published"])
    assert done.exit_code == ExitCode.FINE
    assert "is not in MLflow" in done.stderr
    assert done.output.count("blessed 20") == 3


def test_the_catalogues_nightly_has_fixed_cells_the_aa_arm_and_fits_an_hour() -> None:
    spec = catalogue.load("nightly")
    assert spec.measurement.aa
    assert spec.expand().cells[0].is_emulated, "the most informative first"
    commands._refuse_long(spec, commands.DEFAULT_BUDGET_MIN)
