"""A sweep is found by its id, a prefix, or `last`; and MLflow alone gives the same page as the records."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import pytest

from experiments.errors import UserError
from experiments.names import SweepStatus
from service.errors import InfrastructureError
from service.report.dossier import read_dossier
from service.report.page import page
from service.run.policy import Attempt, Decision
from service.run.tasks import Action, Task
from service.store.extract import FILE_NAME, extract_sweep, records_of
from service.store.home import TRACKING_ENV_VAR, Home
from service.store.judged import load_result
from service.store.records import UnknownSweepError
from service.store.source import open_sweep
from service.store.trace_files import PICTURE_FILE
from service.store.tracking import publish
from tests.service.synthetic import home_in, make_spec, make_sweep
from workers.device_state import DeviceState
from workers.messages import BlockReport, TraceReport

IDS = ("20260102-030405-abcd", "20260102-030405-abff", "20260103-000000-0000")


def published(home: Home, **changes: object) -> str:
    records, result = make_sweep(home, make_spec(4), **changes)
    publish(records, result.sweep_id, load_result(records, result.sweep_id), home)
    records.close()
    return result.sweep_id


def page_from(home: Home, word: str, from_mlflow: bool = False) -> tuple[str, str]:
    with open_sweep(home, word, from_mlflow) as source:
        return page(read_dossier(source)), source.read_from


def only_file(home: Home, name: str) -> Path:
    (path,) = home.artifacts.rglob(name)
    return path


def test_a_sweep_is_found_by_id_prefix_or_last(home: Home) -> None:
    for sweep_id in IDS:
        make_sweep(home, make_spec(), sweep_id, launches=0)[0].close()
    for word, sweep_id in (("last", IDS[2]), (IDS[0], IDS[0]), ("20260103", IDS[2]), ("20260102-030405-abf", IDS[1])):
        with open_sweep(home, word) as source:
            assert source.sweep_id == sweep_id
    with pytest.raises(UserError, match="begins 2 sweeps"), open_sweep(home, "20260102"):
        pass
    for word in ("", "%", "a'b", "../x", "x" * 99):
        with pytest.raises(UserError, match="is no sweep"), open_sweep(home, word):
            pass


def test_an_unknown_sweep_names_the_latest_and_makes_no_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TRACKING_ENV_VAR, raising=False)
    home = home_in(tmp_path)
    make_sweep(home, make_spec(), IDS[0], launches=0)[0].close()
    with pytest.raises(UnknownSweepError, match=IDS[0]), open_sweep(home, "2030"):
        pass
    with pytest.raises(UserError, match="no tracking store"), open_sweep(home, IDS[0], from_mlflow=True):
        pass
    assert not (tmp_path / "mlflow.db").exists()


@pytest.mark.parametrize(
    "changes", [{}, {"invalid": [1], "status": SweepStatus.FAILED}, {"launches": 2, "status": SweepStatus.KILLED}]
)
def test_mlflow_alone_gives_the_same_page(home: Home, tmp_path: Path, changes: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal but for the words on where they were read; also on a machine that has no records."""
    picture = home.traces / IDS[0] / "a-cell" / PICTURE_FILE
    picture.parent.mkdir(parents=True)
    picture.write_bytes(b"\x89PNG of two lanes")
    sweep_id = published(home, **changes)
    local, local_from = page_from(home, sweep_id)
    remote, remote_from = page_from(home, sweep_id, from_mlflow=True)
    assert local_from != remote_from
    assert local.replace(local_from, "") == remote.replace(remote_from, "")
    assert only_file(home, "report.html").read_text() == local
    elsewhere = home_in(tmp_path / "elsewhere")
    monkeypatch.setenv(TRACKING_ENV_VAR, f"sqlite:///{home.folder}/mlflow.db")
    for word in ("last", sweep_id[:-1]):
        found, found_from = page_from(elsewhere, word)
        assert found.replace(found_from, "") == local.replace(local_from, "")


def test_a_sweep_that_only_mlflow_has_is_found_among_others(home: Home) -> None:
    sweep_id = published(home)
    home.records.unlink()
    make_sweep(home, make_spec(), IDS[2], launches=0)[0].close()
    assert page_from(home, sweep_id)[1].startswith("MLflow at ")
    assert page_from(home, "last")[1].startswith("the records at ")
    with pytest.raises(UnknownSweepError, match=f"{IDS[2]}; and .*{sweep_id}"), open_sweep(home, "2030"):
        pass


def test_a_store_out_of_reach_is_not_the_users_mistake(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TRACKING_ENV_VAR, "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(InfrastructureError, match=r"no sweep 'x'.*connection refused"), open_sweep(home, "x"):
        pass


def test_an_older_publication_has_no_extract(home: Home) -> None:
    sweep_id = published(home)
    only_file(home, FILE_NAME).unlink()
    with pytest.raises(UserError, match="an older version published it"), open_sweep(home, sweep_id, from_mlflow=True):
        pass


def test_an_extract_holds_every_row_of_its_sweep_and_no_other(tmp_path: Path) -> None:
    home = home_in(tmp_path)
    make_sweep(home, make_spec(), IDS[1], launches=1)[0].close()
    records, result = make_sweep(home, make_spec(), IDS[0], invalid=[0])
    records.add_settling(IDS[0], result.cells[0].cell["cell_id"], 0, 1, math.inf, False)
    records.add_trace(IDS[0], result.cells[1].cell["cell_id"], 4, [TraceReport(0, (), (), 0, 0)])
    on_a_gpu = BlockReport(0, (), (), 1000.0, DeviceState(100.0, 1980))
    records.add_block(IDS[0], result.cells[1].cell["cell_id"], 9, "arms", 0, [on_a_gpu], 5000.0)
    lost = Attempt(1, "rank 1 on n2: killed", "stack", Decision.REPEAT, ({"rank": 1},))
    records.add_attempt(IDS[0], Task(Action.MEASURE, 2, 0), lost)
    copy, sweep_id = records_of(extract_sweep(records, IDS[0]))
    assert sweep_id == IDS[0]
    tables = [row[0] for row in records.connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    assert {"sweep", "cell", "launch", "trial", "block", "fault", "verification", "settling"} <= set(tables)
    for table in tables:
        rows = [
            tuple(row)
            for row in records.connection.execute(f'SELECT * FROM "{table}" WHERE sweep_id = ? ORDER BY rowid', (IDS[0],))
        ]
        assert rows, table
        assert [tuple(row) for row in copy.connection.execute(f'SELECT * FROM "{table}" ORDER BY rowid')] == rows


def test_extracts_of_equal_records_are_equal_and_strict_json(tmp_path: Path) -> None:
    records, result = make_sweep(home_in(tmp_path), make_spec(), launches=1)
    records.add_settling(result.sweep_id, result.cells[0].cell["cell_id"], 0, 1, math.inf, False)
    extract = extract_sweep(records, result.sweep_id)
    assert extract == extract_sweep(records, result.sweep_id)
    json.loads(gzip.decompress(extract), parse_constant=pytest.fail)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda content: content.update(schema=99), "schema 99"),
        (lambda content: content.update(kind="another"), "no extract"),
        (lambda content: content["tables"]["trial"]["rows"].append([1]), "damaged"),
        (lambda content: content["tables"].update(cell=7), "damaged"),
        (lambda content: content["tables"]["sweep"]["rows"].append(content["tables"]["sweep"]["rows"][0]), "damaged"),
    ],
)
def test_a_wrong_extract_is_refused_in_one_line(tmp_path: Path, change: object, says: str) -> None:
    records, result = make_sweep(home_in(tmp_path), make_spec(), launches=1)
    content = json.loads(gzip.decompress(extract_sweep(records, result.sweep_id)))
    change(content)
    with pytest.raises(UserError, match=says):
        records_of(gzip.compress(json.dumps(content).encode()))


@pytest.mark.parametrize(
    "extract",
    [b"", b"no gzip", gzip.compress(b"{"), gzip.compress(b"[1]"), gzip.compress(b"{}" * 50)[:-9]],
    ids=["empty", "no gzip", "no JSON", "a list", "cut off"],
)
def test_bytes_that_are_no_extract_are_refused(extract: bytes) -> None:
    with pytest.raises(UserError, match=FILE_NAME):
        records_of(extract)


def test_an_extract_cannot_name_tables_or_columns_of_its_own(tmp_path: Path) -> None:
    records, result = make_sweep(home_in(tmp_path), make_spec(), launches=1)
    content = json.loads(gzip.decompress(extract_sweep(records, result.sweep_id)))
    content["tables"]['x"; DROP TABLE sweep; --'] = {"columns": ["sweep_id"], "rows": [["y"]]}
    content["tables"]["sweep"]["columns"].append('z"); DROP TABLE cell; --')
    for row in content["tables"]["sweep"]["rows"]:
        row.append("z")
    copy, sweep_id = records_of(gzip.compress(json.dumps(content).encode()))
    assert load_result(copy, sweep_id).cells == load_result(records, sweep_id).cells
