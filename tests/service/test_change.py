"""Changes between two sweeps: found where planted, not where not, refused where the figures mean other things."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from scipy import stats
from typer.testing import CliRunner, Result

from experiments.errors import UserError
from experiments.names import SweepStatus, Verdict
from service.cli import app
from service.errors import ExitCode
from service.judge.change import ChangeEvidence, compare_sweeps
from service.judge.comparison import Evidence
from service.machine import differences, machine_of
from service.store.home import HOME_ENV_VAR, TRACKING_ENV_VAR, Home
from service.store.judged import load_judged
from tests.service import synthetic
from tests.service.synthetic import home_in, make_spec, make_sweep
from workers.messages import Fault

OLD, NEW = "20260102-030405-abcd", "20260103-030405-abcd"


def evidence(logs: list[float], share: float = 1.0) -> Evidence:
    return Evidence(tuple(logs), tuple(logs), share, 10 * len(logs))


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    monkeypatch.setenv(HOME_ENV_VAR, str(tmp_path))
    monkeypatch.delenv(TRACKING_ENV_VAR, raising=False)
    return home_in(tmp_path)


def both(
    home: Home, old: dict[str, Any] | None = None, new: dict[str, Any] | None = None, num_cells: int = 2, **more: Any
) -> None:
    """Two sweeps with these changes to their specs."""
    for sweep_id, changes in ((OLD, old or {}), (NEW, new or {})):
        make_sweep(home, make_spec(num_cells, **changes), sweep_id, **more)[0].close()


def compared(home: Home):
    records, _ = make_sweep(home, make_spec(), "20260101-000000-0000", launches=0)
    return compare_sweeps(load_judged(records, OLD), load_judged(records, NEW))


def cplab_compare(*words: str) -> Result:
    return CliRunner().invoke(app, ["compare", OLD, NEW, *words])


def test_the_change_is_welchs() -> None:
    rng = random.Random(3)
    old, new = [rng.gauss(-0.10, 0.004) for _ in range(6)], [rng.gauss(-0.07, 0.02) for _ in range(9)]
    change = ChangeEvidence(evidence(old), evidence(new))
    reference = stats.ttest_ind(new, old, equal_var=False)
    read, mean = change.read(0.05, 0.05), sum(new) / 9 - sum(old) / 6
    # The statistic is scipy's; the degrees of freedom are the smaller side's, never more than Satterthwaite's.
    assert change.p_value == pytest.approx(2 * stats.t.sf(abs(reference.statistic), 5))
    assert change.p_value >= reference.pvalue
    half = stats.t.ppf(0.975, 5) * mean / reference.statistic
    assert math.log(read.ratio.low) == pytest.approx(mean - half)
    assert math.log(read.ratio.high) == pytest.approx(mean + half)
    assert math.log(read.ratio.estimate) == pytest.approx(sum(new) / 9 - sum(old) / 6)
    assert read.launches == 6


def test_planned_looks_are_paid_for() -> None:
    """Half the error on either side leaves a quarter: the interval at 5 % is that of a single look at 1.25 %."""
    rng = random.Random(3)
    old, new = ([rng.gauss(0, 0.01) for _ in range(5)] for _ in range(2))
    once, looked = ChangeEvidence(evidence(old), evidence(new)), ChangeEvidence(evidence(old, 0.5), evidence(new, 0.5))
    assert looked.read(0.05, 0.05).ratio == once.read(0.0125, 0.0125).ratio
    assert looked.p_value == pytest.approx(min(1, 4 * once.p_value))


def test_a_p_value_is_the_level_at_which_the_interval_excludes_1() -> None:
    rng = random.Random(4)
    change = ChangeEvidence(evidence([rng.gauss(0, 0.01) for _ in range(5)]), evidence([rng.gauss(0.02, 0.02) for _ in range(7)]))
    for factor, excludes in ((1.001, True), (0.999, False)):
        assert change.read(change.p_value * factor, 0.05).ratio.excludes(1) is excludes


def test_false_alarms_keep_their_level_when_launches_scatter_unequally() -> None:
    """Also far out in the tail: Satterthwaite's degrees of freedom would give 0.28 % for 0.1 % here."""
    rng = random.Random(1)
    p_values = []
    for _ in range(20_000):
        effects = ([rng.gauss(0.1, 0.01) for _ in range(8)], [rng.gauss(0.1, 0.04) for _ in range(5)])
        p_values.append(ChangeEvidence(*map(evidence, effects)).p_value)
    for level in (0.05, 0.008, 0.001):
        assert sum(p <= level for p in p_values) <= 20_000 * level + 3 * math.sqrt(20_000 * level)
    assert sum(p <= 0.05 for p in p_values) > 0.02 * 20_000  # and it does speak


def test_equal_sweeps_have_not_changed(two: Home) -> None:
    both(two, num_cells=4)
    changes = compared(two)
    assert [row.judgement.verdict for row in changes.rows] == [Verdict.SAME] * 4
    assert {row.arm for row in changes.rows} == {"overlapped"}
    done = cplab_compare()
    assert done.exit_code == ExitCode.FINE
    assert done.output.count("SAME") == 4
    assert "not judged" in done.output


def test_a_planted_regression_is_slower_and_exits_1(two: Home, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    make_sweep(two, make_spec(), OLD)[0].close()
    monkeypatch.setitem(synthetic.HIDDEN, "overlapped", 0.3)
    make_sweep(two, make_spec(), NEW)[0].close()
    for row in compared(two).rows:
        assert row.change is not None
        assert row.judgement.verdict is Verdict.SLOWER
        assert row.after.verdict is Verdict.FASTER, "still faster than its baseline, and less so"
        assert row.change.ratio.low < (800 + 200 * 0.7) / (800 + 200 * 0.25) < row.change.ratio.high
    done = cplab_compare("--json", str(tmp_path / "changes.json"))
    assert done.exit_code == ExitCode.REGRESSION
    assert "SLOWER" in done.output
    saved = json.loads((tmp_path / "changes.json").read_text(), parse_constant=pytest.fail)
    assert [row["verdict"] for row in saved["rows"]] == ["SLOWER", "SLOWER"]
    assert saved["rows"][0]["change"]["ratio"]["low"] > 1
    assert saved["before"]["sweep_id"] == OLD
    swapped = CliRunner().invoke(app, ["compare", NEW, OLD])
    assert swapped.exit_code == ExitCode.FINE
    assert "FASTER" in swapped.output


def test_an_invalid_cell_shows_no_change_and_exits_3(two: Home) -> None:
    both(two, num_cells=4)
    records, result = make_sweep(two, make_spec(), "20260101-000000-0000", launches=0)
    records.add_faults(NEW, result.cells[0].cell["cell_id"], [Fault("overlapped", "keys", "rank 1 differs")])
    row = compare_sweeps(load_judged(records, OLD), load_judged(records, NEW)).rows[0]
    assert (row.judgement.verdict, row.change) == (Verdict.INVALID, None)
    done = cplab_compare()
    assert done.exit_code == ExitCode.INVALID
    assert "after: overlapped: rank 1 differs" in done.output


def test_too_few_launches_are_not_enough(two: Home) -> None:
    both(two, launches=1)
    done = cplab_compare()
    assert done.exit_code == ExitCode.INVALID
    assert "too few launches were measured" in done.output


def test_cells_and_arms_that_only_one_has_are_named(two: Home) -> None:
    arms = {"baseline": {}, "overlapped": {"schedule": "overlap_rotate"}}
    more = {**arms, "mine": {"schedule": "my_branch:overlap"}}
    lengths = [{"workload": {"kind": "grid", "new_tokens": values}} for values in ([64, 128], [128, 256])]
    both(two, {"arms": arms, **lengths[0]}, {"arms": more, **lengths[1]})
    changes = compared(two)
    assert {row.label for row in changes.rows} == {f"new128-cp2-zigzag-{link}" for link in ("process_group", "emulated_20mbit")}
    assert set(changes.only_before) == {f"cell new64-cp2-zigzag-{link}" for link in ("process_group", "emulated_20mbit")}
    assert "arm mine" in changes.only_after
    assert "only before: cell new64-cp2-zigzag-process_group" in cplab_compare().output


def test_another_schedule_under_the_same_name_is_said(two: Home) -> None:
    arms = {"baseline": {}, "overlapped": {"schedule": "my_branch:overlap"}}
    both(two, new={"arms": arms})
    assert compared(two).notes == ("arm overlapped: schedule was overlap_rotate, is my_branch:overlap",)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ({}, {"dims": "glm_5"}, "no cell and arm in common"),
        ({}, {"arms": {"baseline": {}, "other": {"schedule": "overlap_rotate"}}}, "no cell and arm in common"),
        ({}, {"arms": {"baseline": {"schedule": "overlap_rotate"}, "overlapped": {}}}, "the baselines differ"),
    ],
)
def test_what_cannot_be_compared_is_refused(two: Home, old: dict, new: dict, says: str) -> None:
    both(two, old, new)
    with pytest.raises(UserError, match=says):
        compared(two)
    assert cplab_compare().exit_code == ExitCode.USER_ERROR


def test_a_sweep_is_not_compared_with_itself_nor_while_it_runs(two: Home) -> None:
    both(two)
    done = CliRunner().invoke(app, ["compare", OLD, OLD])
    assert (done.exit_code, "compared with itself" in done.stderr) == (ExitCode.USER_ERROR, True)
    records, _ = make_sweep(two, make_spec(), "20260101-000000-0000", launches=0)
    records.connection.execute("UPDATE sweep SET status = ?, ended_s = NULL WHERE sweep_id = ?", (SweepStatus.RUNNING, NEW))
    done = cplab_compare()
    assert (done.exit_code, "still running" in done.stderr) == (ExitCode.USER_ERROR, True)


def test_another_methodology_is_refused(two: Home) -> None:
    both(two)
    records, _ = make_sweep(two, make_spec(), "20260101-000000-0000", launches=0)
    records.connection.execute("UPDATE sweep SET methodology_version = 1 WHERE sweep_id = ?", (OLD,))
    done = cplab_compare()
    assert (done.exit_code, "under methodology 1" in done.stderr) == (ExitCode.USER_ERROR, True)


def test_other_hardware_needs_saying_so(two: Home) -> None:
    both(two)
    records, _ = make_sweep(two, make_spec(), "20260101-000000-0000", launches=0)
    records.connection.execute(
        "UPDATE sweep SET environment = json_set(environment, '$.cpu', 'a faster CPU') WHERE sweep_id = ?", (NEW,)
    )
    done = cplab_compare()
    assert done.exit_code == ExitCode.USER_ERROR
    assert "cpu was a planted CPU, is a faster CPU" in done.stderr
    done = cplab_compare("--any-hardware")
    assert done.exit_code == ExitCode.FINE
    assert "OTHER HARDWARE" in done.output


def test_a_flagged_sweep_is_named(two: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    make_sweep(two, make_spec(), OLD)[0].close()
    monkeypatch.setitem(synthetic.HIDDEN, "_aa", 0.5)
    make_sweep(two, make_spec(), NEW)[0].close()
    assert any(f"A/A FLAGGED in {NEW}" in words for words in compared(two).notes)


def test_ranks_laid_on_nodes_in_another_way_are_another_machine() -> None:
    def environment(*nodes: str) -> dict[str, Any]:
        ranks = [{"rank": i, "node_id": node, "hostname": node, "cores": 8} for i, node in enumerate(nodes)]
        return {"cpu": "c", "cores": 8, "launches": [{"cp_size": len(nodes), "ranks": ranks}]}

    base = machine_of(environment("a", "a", "b", "b"))
    assert differences(base, machine_of(environment("c", "c", "d", "d"))) == []
    assert differences(base, machine_of(environment("a", "a", "a", "b"))) != []
    assert differences(base, machine_of(environment("a", "a"))) == [], "another cp_size says nothing"
