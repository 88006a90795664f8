"""Request traces: both forms are read, and a malformed one is refused by file and line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.errors import SpecError
from experiments.workload.trace import Request, read_trace

GOOD: dict[str, Any] = {"timestamp": 27000, "input_length": 1030, "output_length": 500, "hash_ids": [0, 1, 2]}
HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens"


def write(folder: Path, name: str, *lines: str) -> Path:
    path = folder / name
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def refusal(path: Path, limit: int | None = None) -> str:
    with pytest.raises(SpecError) as caught:
        read_trace(path, limit)
    message = str(caught.value)
    assert message.startswith("workload.trace: ")
    assert str(path) in message
    assert "\n" not in message
    return message


def test_reads_jsonl(tmp_path: Path) -> None:
    other = {"timestamp": 30000.5, "input_length": 512, "output_length": 0, "hash_ids": [3], "note": "ignored"}
    path = write(tmp_path, "trace.jsonl", json.dumps(GOOD), "", json.dumps(other))
    assert read_trace(path) == [Request(27000.0, 1030, 500, (0, 1, 2)), Request(30000.5, 512, 0, (3,))]


def test_reads_csv_with_dates(tmp_path: Path) -> None:
    path = write(tmp_path, "trace.csv", HEADER, "2023-11-16 18:17:03.9799600,4808,10", "2023-11-16 18:17:04.0319600,3180,8")
    assert read_trace(path) == [Request(0.0, 4808, 10, None), Request(52.0, 3180, 8, None)]


def test_reads_csv_with_numbers_a_loose_header_and_more_columns(tmp_path: Path) -> None:
    path = write(
        tmp_path, "trace.CSV", "\ufeffgenerated_tokens, Timestamp ,context tokens, model", '10, 1.5, "4808", a', "8,2e3,3180,b"
    )
    assert read_trace(path) == [Request(1.5, 4808, 10, None), Request(2000.0, 3180, 8, None)]


def test_dates_with_and_without_zone_are_utc(tmp_path: Path) -> None:
    path = write(tmp_path, "t.csv", HEADER, "2024-05-10 00:00:00,1,1", "2024-05-10 02:00:01+02:00,2,1")
    assert [r.timestamp_ms for r in read_trace(path)] == [0.0, 1000.0]


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_the_first_line_tells_the_form_under_another_suffix(tmp_path: Path, line_end: str) -> None:
    (tmp_path / "a.txt").write_bytes((json.dumps(GOOD) + line_end).encode())
    (tmp_path / "b.txt").write_bytes(f"{HEADER}{line_end}1,2,3{line_end}".encode())
    assert read_trace(tmp_path / "a.txt")[0].block_ids == (0, 1, 2)
    assert read_trace(tmp_path / "b.txt") == [Request(1.0, 2, 3, None)]


def test_requests_are_sorted_by_arrival_and_equal_ones_keep_their_order(tmp_path: Path) -> None:
    rows = [{**GOOD, "timestamp": t, "output_length": i} for i, t in enumerate([5, 3, 5, 3, 0])]
    path = write(tmp_path, "t.jsonl", *map(json.dumps, rows))
    assert [r.output_tokens for r in read_trace(path)] == [4, 1, 3, 0, 2]


def test_lines_beyond_the_limit_are_not_looked_at(tmp_path: Path) -> None:
    path = write(tmp_path, "t.jsonl", json.dumps(GOOD), json.dumps(GOOD), "{broken")
    assert len(read_trace(path, limit=2)) == 2
    assert ":3: not JSON" in refusal(path, limit=3)


def test_fewer_requests_than_the_limit_are_all_there_are(tmp_path: Path) -> None:
    assert len(read_trace(write(tmp_path, "t.jsonl", json.dumps(GOOD)), limit=50)) == 1


def test_another_block_size(tmp_path: Path) -> None:
    path = write(tmp_path, "t.jsonl", json.dumps({**GOOD, "input_length": 33, "hash_ids": [0, 1, 2]}))
    assert read_trace(path, block_tokens=16)[0].block_ids == (0, 1, 2)
    assert "workload.block_tokens" in refusal(path)


@pytest.mark.parametrize("field", sorted(GOOD))
def test_a_missing_field_is_named(tmp_path: Path, field: str) -> None:
    row = {key: value for key, value in GOOD.items() if key != field}
    message = refusal(write(tmp_path, "t.jsonl", json.dumps(GOOD), json.dumps(row)))
    assert f":2: {field} is missing" in message


@pytest.mark.parametrize(
    ("field", "value", "shown"),
    [
        ("timestamp", True, "True"),
        ("timestamp", "0", "'0'"),
        ("timestamp", None, "None"),
        ("timestamp", -1, "-1"),
        ("timestamp", 10**400, "1000"),
        ("input_length", 0, "0"),
        ("input_length", -5, "-5"),
        ("input_length", 1030.0, "1030.0"),
        ("input_length", "1030", "'1030'"),
        ("input_length", True, "True"),
        ("input_length", None, "None"),
        ("input_length", 10**12, "1000000000000"),
        ("output_length", -1, "-1"),
        ("output_length", False, "False"),
        ("output_length", 1.5, "1.5"),
        ("output_length", [1], "[1]"),
        ("hash_ids", None, "None"),
        ("hash_ids", "0,1,2", "'0,1,2'"),
        ("hash_ids", {"0": 1}, "{'0': 1}"),
        ("hash_ids", [0, "1", 2], "'1'"),
        ("hash_ids", [0, 1.0, 2], "1.0"),
        ("hash_ids", [0, True, 2], "True"),
        ("hash_ids", [0, None, 2], "None"),
        ("hash_ids", [0, 1], "2 ids, but input_length 1030"),
        ("hash_ids", [0, 1, 2, 3], "4 ids, but input_length 1030"),
        ("hash_ids", [], "0 ids"),
        ("hash_ids", [0, 7, 7], "7 twice"),
    ],
)
def test_a_wrong_value_is_named_and_shown(tmp_path: Path, field: str, value: Any, shown: str) -> None:
    path = write(tmp_path, "t.jsonl", json.dumps(GOOD), "", json.dumps({**GOOD, field: value}))
    message = refusal(path)
    assert f"{path}:3: {field}" in message
    assert shown in message


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
@pytest.mark.parametrize("field", sorted(GOOD))
def test_values_outside_json_are_refused(tmp_path: Path, field: str, constant: str) -> None:
    line = json.dumps({**GOOD, field: 0}).replace(f'"{field}": 0', f'"{field}": {constant}')
    assert f":1: {constant} is not a value" in refusal(write(tmp_path, "t.jsonl", line))


def test_a_number_too_large_for_a_float_is_refused(tmp_path: Path) -> None:
    line = json.dumps(GOOD).replace("27000", "1e999")
    assert ":1: timestamp must be" in refusal(write(tmp_path, "t.jsonl", line))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ('{"timestamp": 0,}', "not JSON"),
        ("timestamp input_length", "not JSON"),
        (json.dumps(GOOD)[:-20], "not JSON"),
        (json.dumps(GOOD) * 2, "not JSON"),
        ("[1, 2, 3]", "expected a JSON object"),
        ("null", "expected a JSON object"),
        ("17", "expected a JSON object"),
        ('"text"', "expected a JSON object"),
        ("9" * 5000, "not JSON"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_line_that_is_no_object_is_refused(tmp_path: Path, line: str, message: str) -> None:
    said = refusal(write(tmp_path, "t.jsonl", json.dumps(GOOD), line))
    assert f":2: {message}" in said
    assert len(said) < 400 + len(str(tmp_path))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["a,b,c", "1,2,3"], ":1: the header has no column TIMESTAMP"),
        (["TIMESTAMP,ContextTokens", "1,2"], ":1: the header has no column GeneratedTokens"),
        ([f"{HEADER},timestamp", "1,2,3,4"], ":1: the header has more than one column TIMESTAMP"),
        (["1,2,3"], ":1: the header has no column"),
        ([HEADER, "1,2,3", "1,2"], ":3: 2 values under a header of 3"),
        ([HEADER, "1,2,3,4"], ":2: 4 values under a header of 3"),
        ([HEADER, '1,"2,3'], ":2: not CSV"),
        ([HEADER, "1,0,3"], ":2: ContextTokens must be"),
        ([HEADER, "1,-2,3"], ":2: ContextTokens must be"),
        ([HEADER, "1,,3"], ":2: ContextTokens must be"),
        ([HEADER, "1,nan,3"], ":2: ContextTokens must be"),
        ([HEADER, "1,2.0,3"], ":2: ContextTokens must be"),
        ([HEADER, "1,1_000,3"], ":2: ContextTokens must be"),
        ([HEADER, f"1,{10**12},3"], ":2: ContextTokens must be"),
        ([HEADER, f"1,{'9' * 5000},3"], ":2: ContextTokens must be"),
        ([HEADER, "1,True,3"], ":2: ContextTokens must be"),
        ([HEADER, "1,2,-3"], ":2: GeneratedTokens must be"),
        ([HEADER, "1,2,x"], ":2: GeneratedTokens must be"),
        ([HEADER, ",2,3"], ":2: TIMESTAMP must be"),
        ([HEADER, "soon,2,3"], ":2: TIMESTAMP must be"),
        ([HEADER, "nan,2,3"], ":2: TIMESTAMP must be"),
        ([HEADER, "1e999,2,3"], ":2: TIMESTAMP must be"),
        ([HEADER, "-1,2,3"], ":2: TIMESTAMP must be"),
        ([HEADER, "2023-13-16 18:17:03,2,3"], ":2: TIMESTAMP must be"),
        ([HEADER, "1,2,3", "2023-11-16 18:17:03,2,3"], ":3: TIMESTAMP must be a number like the rows before"),
        ([HEADER, "2023-11-16 18:17:03,2,3", "1,2,3"], ":3: TIMESTAMP must be a date and time like the rows before"),
    ],
)
def test_a_malformed_csv_is_refused(tmp_path: Path, lines: list[str], message: str) -> None:
    assert message in refusal(write(tmp_path, "t.csv", *lines))


@pytest.mark.parametrize("name", ["t.jsonl", "t.csv", "t.txt"])
@pytest.mark.parametrize("text", ["", "\n\n  \n"])
def test_an_empty_file_is_refused(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    assert "holds no requests" in refusal(path)


def test_a_header_alone_is_refused(tmp_path: Path) -> None:
    assert "holds no requests" in refusal(write(tmp_path, "t.csv", HEADER))


def test_neither_form_is_refused(tmp_path: Path) -> None:
    assert ":1: neither form of trace" in refusal(write(tmp_path, "t.txt", "once upon a time"))


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "absent.jsonl")
    assert "is a directory" in refusal(tmp_path)
    assert "not a regular file" in refusal(Path("/dev/null"))
    assert "--set workload.trace=PATH" in refusal(tmp_path / "absent.jsonl")


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n{"timestamp": "\xff"}\n')
    assert ":2: not UTF-8 text (byte 16 of the line is 0xff)" in refusal(path)
    path.write_bytes(json.dumps(GOOD).encode("utf-16"))
    assert ":1: not UTF-8" in refusal(path)


def read_or_refuse(path: Path, where: str = "") -> list[Request] | None:
    """The requests, or None where they were refused in one clear line; any other exception fails the test."""
    try:
        return read_trace(path)
    except SpecError as error:
        message = str(error)
    assert message.startswith(f"workload.trace: {path}{where}") or message.startswith(f"workload.trace: '{path}'")
    assert "\n" not in message
    return None


_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(row=st.fixed_dictionaries({}, optional=dict.fromkeys(GOOD, _values)) | _values)
def test_any_json_is_a_request_or_one_clear_line(tmp_path_factory: pytest.TempPathFactory, row: Any) -> None:
    path = write(tmp_path_factory.getbasetemp(), "fuzz.jsonl", json.dumps(row))
    request = read_or_refuse(path, where=":1: ")
    if request:
        assert request[0].input_tokens >= 1
        assert math.isfinite(request[0].timestamp_ms)


@given(content=st.binary(max_size=60))
@pytest.mark.parametrize("name", ["fuzz.jsonl", "fuzz.csv", "fuzz.bin"])
def test_any_bytes_are_requests_or_one_clear_line(tmp_path_factory: pytest.TempPathFactory, name: str, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(content)
    assert read_or_refuse(path) != []


@given(row=st.tuples(*[st.text(st.sampled_from('0123456789-+:. TZe",nai'), max_size=26)] * 3))
def test_any_csv_row_is_a_request_or_one_clear_line(tmp_path_factory: pytest.TempPathFactory, row: tuple[str, ...]) -> None:
    dated = f"2023-11-16 18:17:03,1,1\n{','.join(row)}\n"
    path = tmp_path_factory.getbasetemp() / "fuzz-row.csv"
    path.write_text(f"{HEADER}\n{dated}")
    assert read_or_refuse(path, where=":3: ") != []
