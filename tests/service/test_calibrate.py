"""What the method errs by is counted rightly: recordings, the rule run again, planted noise, rivals; and a study really runs."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.errors import SpecError, UserError
from experiments.names import Verdict
from service.calibrate.error_rates import Rate, false_alarms, power_curve, rerun, rule_on
from service.calibrate.live import LiveComparison, read_live, run_live
from service.calibrate.recording import LaunchSamples, Recording, read, write
from service.calibrate.rivals import Said
from service.calibrate.simulation import MODELS, coverage
from service.calibrate.study import Plan, Study, lasting, smaller_cell, study_spec
from service.calibrate.tables import alarms_table, cheapest_table, live_table, power_table, rivals_table
from service.judge.looks import Looks
from service.run.local_ranks import local_group
from service.store.records import Records
from tests.service.recordings import make_recording


def test_a_recording_survives_its_file(tmp_path: Path):
    path = tmp_path / "aa.jsonl"
    for seed in (1, 2):
        write(make_recording(seed), path)
    assert list(read([path])) == [make_recording(1), make_recording(2)]


@pytest.mark.parametrize(("line", "says"), [("{", "aa.jsonl:2"), ('{"kind": "aa"}', "machine")])
def test_a_line_that_is_no_recording_is_named(tmp_path: Path, line: str, says: str):
    path = tmp_path / "aa.jsonl"
    write(make_recording(1), path)
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match=says):
        list(read([path]))


def test_a_file_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"nowhere\.jsonl"):
        list(read([tmp_path / "nowhere.jsonl"]))


def test_rates_come_with_exact_bounds():
    low, high = Rate(5, 200).bounds
    assert (round(low, 4), round(high, 4)) == (0.0082, 0.0574)  # published tables of Clopper and Pearson
    assert Rate(0, 0).bounds == (0.0, 1.0)


def test_a_recording_says_its_verdict_as_a_table_does():
    assert make_recording(2, verdict=Verdict.SLOWER, may_be_small=True).words == "SLOWER (maybe small)"
    assert make_recording(2, verdict=Verdict.SLOWER).words == "SLOWER"


def launches_at(*logs: float, logs_min: tuple[float, ...] = ()) -> tuple[LaunchSamples, ...]:
    """One pair in each; the fastest ranks differ as the slowest do, or as said."""
    return tuple(
        LaunchSamples(
            baseline_us=(1000.0,),
            other_us=(1000 * math.exp(log),),
            baseline_min_us=(900.0,),
            other_min_us=(900 * math.exp(log_min),),
        )
        for log, log_min in zip(logs, logs_min or logs, strict=True)
    )


def test_alarms_are_counted_by_what_they_claim():
    def judged(verdict: Verdict, ratio: tuple[float, float, float], *logs: float, logs_min: tuple[float, ...] = ()) -> Recording:
        return make_recording(1, verdict=verdict, ratio=ratio).model_copy(
            update={"launches": launches_at(*logs, logs_min=logs_min)}
        )

    slower, faster = Verdict.SLOWER, Verdict.FASTER
    recordings = [
        judged(Verdict.UNRESOLVED, (1.0, 0.8, 1.2), *([0.1, -0.1] * 4)),
        judged(slower, (1.051, 1.045, 1.058), 0.048, 0.049, 0.05, 0.051, 0.052),
        judged(slower, (1.01, 1.004, 1.017), 0.008, 0.009, 0.01, 0.011, 0.012),  # reaches into the band
        judged(slower, (1.078, 1.015, 1.145), 0.022, 0.057, 0.075, 0.093, 0.128),  # beyond the band, and at 99 % not told from 1
        judged(faster, (0.995, 0.994, 0.996), -0.0052, -0.0051, -0.005, -0.0049, -0.0048),  # inside the band
        judged(
            Verdict.UNRESOLVED, (1.051, 1.045, 1.058), *([0.048, 0.052] * 4), logs_min=(0.0, 0.1) * 4
        ),  # the fastest ranks do not agree
        judged(Verdict.SAME, (1.0, 0.999, 1.001), -0.001, -0.0005, 0.0, 0.0005, 0.001),
    ]
    found = false_alarms(recordings, 1.0)
    assert (found.excluding.hits, found.claims.hits, found.same.hits) == (5, 1, 1)
    assert false_alarms(recordings, 0.0).claims.hits == 4, "without a band every FASTER and SLOWER is a claim"


def test_the_rule_run_again_on_equal_arms_keeps_its_level_and_finds_what_is_planted():
    equal = [make_recording(seed) for seed in range(40)]
    again = rerun(equal, 1500, indifference_pct=0.0)
    assert again.excluding.bounds[0] <= 0.05  # by the union bound it is at most 5 %
    assert again.excluding.hits > 0  # and it can err: a rule that never speaks keeps any level
    assert rerun(equal, 50, 1.0, seed=3) == rerun(equal, 50, 1.0, seed=3)


def test_power_is_read_against_what_was_planted():
    recordings = [make_recording(seed, 5.0) for seed in range(6)] + [make_recording(9, 1.0, verdict=Verdict.UNRESOLVED)]
    one, five = power_curve(recordings, 1.0)
    assert (one.planted_pct, one.found.hits, one.found.count) == (1.0, 0, 1)
    assert (five.found.hits, five.clear.hits, five.covered.hits) == (6, 6, 6)
    (two,) = power_curve([make_recording(7, 2.0, ratio=(1.02, 1.004, 1.036))], 1.0)
    assert (two.found.hits, two.clear.hits) == (1, 0), "found, and perhaps too small to matter"
    assert five.inside_s == 5.0


def test_the_recorded_rule_stops_where_the_service_would():
    end = rule_on(make_recording(1, 20.0).launches, Looks(5, 8), 1.0)
    assert (end.launches, end.verdict) == (5, Verdict.SLOWER)
    assert rule_on(make_recording(2).launches, Looks(5, 8), 0.0).launches == 8


@pytest.mark.parametrize("model", MODELS)
def test_intervals_cover_under_every_noise_model(model: str):
    found = coverage(model, 250, Looks(8, 20), effect_pct=3.0, indifference_pct=1.0)
    assert found.holds.bounds[1] >= 0.95  # 250 comparisons tell a method that covers 90 % from one that covers 95
    assert found.width < 2


def test_a_rule_without_launches_would_not_cover():
    """The simulation can fail: with launches that prefer an arm, trials taken as independent cover far less."""
    import numpy as np

    rng = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        log_times = MODELS["launch_effects"](rng, 8, 80)
        other = np.arange(80) % 4 % 3 != 0
        pairs = (log_times[:, other] - log_times[:, ~other]).ravel()
        half = 1.96 * pairs.std(ddof=1) / math.sqrt(pairs.size)
        held += abs(pairs.mean()) <= half
    assert held / 200 < 0.9


def test_what_was_planted_is_taken_launch_by_launch():
    """A wait is a larger share of a launch that ran faster, and a preempted trial does not make it a smaller one."""
    fast, slow = (
        LaunchSamples(baseline_us=(us, us, 9 * us), other_us=(us,) * 3, baseline_min_us=(us,) * 3, other_min_us=(us,) * 3)
        for us in (500.0, 2000.0)
    )
    recording = make_recording(1, 5.0).model_copy(update={"launches": (fast, slow), "planted_wait_us": 100.0})
    assert recording.true_log_ratio == pytest.approx((math.log(1.2) + math.log(1.05)) / 2)


def test_a_recording_of_several_blocks_is_read_block_by_block():
    launch = LaunchSamples(
        baseline_us=(1.0, 1.0, 100.0, 100.0),
        other_us=(1.0, 2.0, 100.0, 200.0),
        baseline_min_us=(1.0,) * 4,
        other_min_us=(1.0,) * 4,
        block=(0, 0, 1, 1),
    )
    assert launch.log_ratio == pytest.approx(math.log(2) / 2)
    assert launch.first(3).block == (0, 0, 1)
    assert launch.log_ratio_min == 0


def test_tables_say_what_they_lack():
    equal = [make_recording(1)]
    assert "1 of" not in rivals_table(equal, 1.0)
    assert "no table of rivals" in rivals_table(equal, 1.0)
    assert "no table of best plans" in cheapest_table(equal, 1.0)
    assert "| quiet | 0 of 1" in alarms_table(equal, 0, 1.0)
    assert "| 5 % | 1 of 1" in power_table([make_recording(3, 5.0)], 1.0)


@pytest.fixture
def study_group():
    with lasting(local_group(2)) as group:
        yield group


SMALL = ["workload.new_tokens=64", "measurement.trials_per_block=6", "measurement.warmup_trials=1", "measurement.max_launches=5"]


def test_a_study_measures_judges_and_records(tmp_path: Path, study_group):
    records = Records(tmp_path / "records.db")
    study = Study(records, study_group, SMALL)
    made = study.compare(Plan("power", 11, planted_pct=300.0))
    assert made.verdict is Verdict.SLOWER
    assert len(made.launches) == 5
    assert all(len(launch.baseline_us) == 6 for launch in made.launches)
    assert made.planted_wait_us == pytest.approx(3 * made.pilot_us, rel=1e-3)
    assert made.inside_s > made.starting_s / 10 > 0
    assert records.sweep(made.sweep_id)["status"] == "FINISHED"
    assert {action for action, _ in records.spent(made.sweep_id)} >= {"launch", "verify", "measure"}
    records.close()


def test_live_runs_hold_one_version_a_launch(tmp_path: Path, study_group):
    made = run_live(study_group, study_spec(SMALL, 3, 20_000.0), "m", 400.0)
    assert [len(run) for run in made.baseline_us] == [6] * 4
    assert min(min(run) for run in made.other_us) >= 20_000
    path = tmp_path / "live.jsonl"
    path.write_text(made.model_dump_json() + "\n")
    assert list(read_live(path)) == [made]
    assert "| two runs and a t-test | 1 of 1" in live_table([made])
    path.write_text("{}\n")
    with pytest.raises(UserError, match="no live comparison"):
        list(read_live(path))


def test_equal_live_runs_are_equal():
    run = (1000.0, 1100.0, 900.0, 1050.0) * 3
    same = LiveComparison(machine="m", seed=0, planted_pct=0, baseline_us=(run,) * 4, other_us=(run,) * 4)
    assert set(same.verdicts().values()) == {Said.NOTHING}


@pytest.mark.parametrize(
    ("new_tokens", "launch_s", "fewer"),
    [(256, 0.8, None), (256, 1.5, None), (256, 2.0, 128), (256, 2.1, 64), (256, 5.1, 32), (256, 60.0, 32), (32, 60.0, None)],
)
def test_a_slow_machine_is_told_a_smaller_cell(new_tokens: int, launch_s: float, fewer: int | None):
    assert smaller_cell(new_tokens, launch_s) == fewer


def test_the_command_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "aa.jsonl"
    sets = [part for change in SMALL for part in ("--set", change)]
    base = [sys.executable, "-m", "service", "calibrate", "aa", "--plain", "--out", str(out), *sets]
    monkeypatch.setenv("CPLAB_HOME", str(tmp_path))
    assert subprocess.run([*base, "--comparisons", "1"], check=True, timeout=120).returncode == 0
    done = subprocess.run([*base, "--comparisons", "2"], check=True, timeout=120, capture_output=True, text=True)
    assert "1 of 2 comparisons are in" in done.stdout
    assert [recording.seed for recording in read([out])] == [1, 2]
    summary = subprocess.run(
        [sys.executable, "-m", "service", "calibrate", "summary", str(out), "--reruns", "20"],
        check=True,
        timeout=120,
        capture_output=True,
        text=True,
    )
    assert "| quiet | " in summary.stdout


def test_a_folder_that_is_not_there_is_one_line(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-m", "service", "calibrate", "aa", "--out", str(tmp_path / "no" / "aa.jsonl")],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("cplab: error: --out: no folder at")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("cells.cp_size=[1,2]", "one cell"),
        ("cells.split=[zigzag,interleave]", "one cell"),
        ("seed=4", "seeds"),
        ("arms.other=1", "arms"),
    ],
)
def test_a_study_refuses_what_it_sets_itself(override: str, says: str):
    with pytest.raises(SpecError, match=says):
        study_spec([override], 1, 0.0)


def test_a_file_that_is_no_text_is_named(tmp_path: Path):
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(UserError, match=r"picture\.png.*no text"):
        list(read([tmp_path / "picture.png"]))


def test_recordings_of_different_plans_are_not_pooled():
    with pytest.raises(UserError, match="different plans"):
        rerun([make_recording(1), make_recording(2, max_launches=20)], 5, 1.0)
