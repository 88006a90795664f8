"""Request traces: a JSONL or CSV file in, requests in arrival order out, or the line that is wrong.

JSONL is Mooncake's published form, one object a line (`timestamp` in ms, `input_length`, `output_length`, `hash_ids`). CSV is the
form of Azure's LLM inference traces: `TIMESTAMP, ContextTokens, GeneratedTokens`, without block ids. Further fields are ignored.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

from experiments.errors import SpecError

TRACE_BLOCK_TOKENS = 512
"""Prompt tokens that one of Mooncake's `hash_ids` covers; the last one of a prompt may cover fewer."""

_KEY = "workload.trace"
_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
_MAX_TOKENS = 1 << 30  # A sanity bound: a corrupt length would otherwise become millions of steps.
_JSON_FIELDS = "timestamp, input_length, output_length, hash_ids"
_CSV_COLUMNS = {"timestamp": "TIMESTAMP", "contexttokens": "ContextTokens", "generatedtokens": "GeneratedTokens"}
_EXPECTED = f"expected JSONL ({_JSON_FIELDS}) or CSV (header {', '.join(_CSV_COLUMNS.values())})"
_WHOLE = re.compile(r"[+-]?[0-9]{1,18}")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


@dataclass(frozen=True, slots=True)
class Request:
    """One request: `block_ids` name its prompt's blocks in order, or None where the trace has none."""

    timestamp_ms: float
    """From the trace's start; a CSV's dates are counted from its first row."""
    input_tokens: int
    output_tokens: int
    block_ids: tuple[int, ...] | None


class _BadLineError(Exception):
    """What is wrong with a line, before file and number are known."""


def read_trace(path: Path | str, limit: int | None = None, block_tokens: int = TRACE_BLOCK_TOKENS) -> list[Request]:
    """The first `limit` (at least 1; None: all) requests of the file, sorted by arrival; equal arrivals keep the file's order.

    The suffix says which form it is (.jsonl, .ndjson, .json, .csv); under any other, the first line does. Blank lines are
    skipped, and lines after the last request wanted are not looked at.

    Args:
        path: The trace.
        limit: How many requests to read from the file's start.
        block_tokens: Tokens that each of `hash_ids` covers; their count is checked against the prompt's length.

    Raises:
        SpecError: No such file, nothing in it, or a malformed line (with its number).
    """
    path = Path(path)
    _check_is_file(path)
    requests: list[Request] = []
    parser: _JsonLines | _CsvLines | None = None
    for number, line in _lines(path):
        try:
            if parser is None:
                parser = _parser_for(path, line, block_tokens)
            request = parser.parse(line)
        except _BadLineError as error:
            raise SpecError(f"{_KEY}: {path}:{number}: {error}") from None
        if request is not None:
            requests.append(request)
            if len(requests) == limit:
                break
    if not requests:
        raise SpecError(f"{_KEY}: {path} holds no requests; {_EXPECTED}")
    return sorted(requests, key=lambda request: request.timestamp_ms)


def _check_is_file(path: Path) -> None:
    try:
        if path.is_file():
            return
        problem = "does not exist"
        if path.exists():
            problem = "is a directory, not a file" if path.is_dir() else "is not a regular file"
    except OSError as error:
        problem = f"cannot be read: {error.strerror}"
    raise SpecError(f"{_KEY}: {str(path)!r} {problem}; give a JSONL or CSV trace, as in --set {_KEY}=PATH")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, with their numbers from 1."""
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                try:
                    # Spreadsheets put a byte order mark before the first line.
                    line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                except UnicodeDecodeError as error:
                    problem = f"not UTF-8 text (byte {error.start + 1} of the line is 0x{raw[error.start]:02x})"
                    raise SpecError(f"{_KEY}: {path}:{number}: {problem}; unpack it if it is compressed") from None
                if line:
                    yield number, line
    except OSError as error:
        raise SpecError(f"{_KEY}: {str(path)!r} cannot be read: {error.strerror}") from None


def _parser_for(path: Path, first_line: str, block_tokens: int) -> _JsonLines | _CsvLines:
    suffix = path.suffix.lower()
    if suffix in _JSON_SUFFIXES or (suffix != ".csv" and first_line.startswith("{")):
        return _JsonLines(block_tokens)
    if suffix == ".csv" or "," in first_line:
        return _CsvLines()
    raise _BadLineError(f"neither form of trace: {_shown(first_line)}; {_EXPECTED}")


class _JsonLines:
    """Mooncake's form."""

    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens

    def parse(self, line: str) -> Request:
        try:
            row = json.loads(line, parse_constant=_refuse_constant)
        except json.JSONDecodeError as error:
            raise _BadLineError(f"not JSON ({error.msg} at column {error.colno}): {_shown(line)}") from None
        except (ValueError, RecursionError) as error:  # A number of thousands of digits; brackets without end.
            raise _BadLineError(f"not JSON ({error}): {_shown(line)}") from None
        if not isinstance(row, dict):
            raise _BadLineError(f"expected a JSON object, not {_shown(row)}")
        timestamp = _field(row, "timestamp")
        if isinstance(timestamp, bool) or not isinstance(timestamp, int | float):
            _refuse("timestamp", timestamp, "a number of milliseconds of at least 0")
        input_tokens = _tokens("input_length", _field(row, "input_length"), least=1)
        return Request(
            timestamp_ms=_milliseconds("timestamp", timestamp),
            input_tokens=input_tokens,
            output_tokens=_tokens("output_length", _field(row, "output_length"), least=0),
            block_ids=self._block_ids(_field(row, "hash_ids"), input_tokens),
        )

    def _block_ids(self, value: Any, input_tokens: int) -> tuple[int, ...]:
        if not isinstance(value, list):
            _refuse("hash_ids", value, "a list of whole numbers")
        for item in value:
            if isinstance(item, bool) or not isinstance(item, int):
                _refuse("hash_ids", item, "a list of whole numbers", holds=True)
        expected = -(-input_tokens // self._block_tokens)
        if len(value) != expected:
            raise _BadLineError(
                f"hash_ids has {len(value)} ids, but input_length {input_tokens} in blocks of {self._block_tokens} tokens makes"
                f" {expected} (workload.block_tokens says what one id covers)"
            )
        if len(set(value)) != len(value):
            # An id stands for the whole prompt up to its block, so it cannot come twice in one prompt.
            twice = next(item for item, times in Counter(value).items() if times > 1)
            raise _BadLineError(f"hash_ids has {_shown(twice)} twice; an id stands for one block and all before it")
        return tuple(value)


class _CsvLines:
    """Azure's form: a header line, then rows. Numeric timestamps are taken as milliseconds."""

    def __init__(self) -> None:
        self._columns: list[str] = []
        self._start: datetime | None = None
        self._has_dates: bool | None = None

    def parse(self, line: str) -> Request | None:
        """The row's request; None for the header."""
        try:
            values = [value.strip() for value in next(csv.reader([line], strict=True, skipinitialspace=True))]
        except (csv.Error, StopIteration) as error:
            raise _BadLineError(f"not CSV ({error}): {_shown(line)}") from None
        if not self._columns:
            self._read_header(values)
            return None
        if len(values) != len(self._columns):
            raise _BadLineError(f"{len(values)} values under a header of {len(self._columns)} columns: {_shown(line)}")
        row = dict(zip(self._columns, values, strict=True))
        return Request(
            timestamp_ms=self._timestamp_ms(row["timestamp"]),
            input_tokens=_tokens("ContextTokens", _whole("ContextTokens", row["contexttokens"], least=1), least=1),
            output_tokens=_tokens("GeneratedTokens", _whole("GeneratedTokens", row["generatedtokens"], least=0), least=0),
            block_ids=None,
        )

    def _read_header(self, names: list[str]) -> None:
        columns = [re.sub(r"[\s_]", "", name).lower() for name in names]
        for column, name in _CSV_COLUMNS.items():
            if columns.count(column) != 1:
                problem = "has no column" if column not in columns else "has more than one column"
                needed = ", ".join(_CSV_COLUMNS.values())
                raise _BadLineError(f"the header {problem} {name}: {_shown(', '.join(names))}; needed: {needed}")
        self._columns = columns

    def _timestamp_ms(self, text: str) -> float:
        allowed = "a number of milliseconds of at least 0, or a date and time such as 2023-11-16 18:17:03.9799600"
        is_date = _NUMBER.fullmatch(text) is None
        if is_date:
            try:
                moment = datetime.fromisoformat(text)
            except ValueError:
                _refuse("TIMESTAMP", text, allowed)
        if self._has_dates not in (None, is_date):
            _refuse("TIMESTAMP", text, f"a {'date and time' if self._has_dates else 'number'} like the rows before")
        self._has_dates = is_date
        if not is_date:
            return _milliseconds("TIMESTAMP", float(text))
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=UTC)
        self._start = self._start or moment
        return (moment - self._start).total_seconds() * 1000


def _field(row: dict[str, Any], name: str) -> Any:
    if name not in row:
        raise _BadLineError(f"{name} is missing; the fields are {_JSON_FIELDS}")
    return row[name]


def _whole(name: str, text: str, least: int) -> int:
    if not _WHOLE.fullmatch(text):
        _refuse(name, text, _token_range(least))
    return int(text)


def _tokens(name: str, value: Any, least: int) -> int:
    # bool is an int to Python, and `true` is not a length.
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= _MAX_TOKENS:
        _refuse(name, value, _token_range(least))
    return value


def _token_range(least: int) -> str:
    return f"a whole number of tokens from {least} to {_MAX_TOKENS}"


def _milliseconds(name: str, value: int | float) -> float:
    try:
        milliseconds = float(value)
    except OverflowError:
        milliseconds = math.inf
    if not math.isfinite(milliseconds) or milliseconds < 0:
        _refuse(name, value, "a number of milliseconds of at least 0")
    return milliseconds


def _refuse_constant(name: str) -> NoReturn:
    raise _BadLineError(f"{name} is not a value that JSON or a trace can hold")


def _refuse(name: str, value: object, allowed: str, holds: bool = False) -> NoReturn:
    raise _BadLineError(f"{name} must be {allowed}, {'and holds' if holds else 'not'} {_shown(value)}")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
