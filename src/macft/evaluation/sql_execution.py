"""Execution accuracy (Yu et al. 2018, Spider): a query is right if it returns what the expected query returns.

Generated queries are untrusted. They run on a temporary in-memory database, may only read, and have limits on time (in
SQLite's compiler and in its virtual machine), on SQLite's heap and on the size of the rows in Python. All rows are
compared; a query that exceeds a limit is wrong.
"""

from __future__ import annotations

import math
import re
import sqlite3
import time

from macft.data.formats import Record
from macft.errors import DataError

_MAX_QUERY_CHARACTERS = 4000
# Few, because one step can be a slow function call on two long values.
_STEPS_BETWEEN_CHECKS = 20
_MAX_CHECKS = 100_000
_MAX_SECONDS = 10.0
_MAX_VALUE_BYTES = 100_000
_MAX_COLUMNS = 50
_MAX_PATTERN_BYTES = 1000
# SQLite's limit counts all connections of the process and can only be lowered.
_MAX_HEAP_BYTES = 256 * 2**20
_MAX_RESULT_BYTES = 64 * 2**20
_ROW_BYTES, _VALUE_BYTES = 64, 48
# They make large values from small ones, or a different value each time; no answer needs them.
_DENIED_FUNCTIONS = {"load_extension", "randomblob", "zeroblob", "fts3_tokenizer"}
_ALLOWED = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
_QUERY = re.compile(
    r"\bselect\b|\bwith\s+(?:recursive\s+)?\w+\s*(?:\([^)]*\)\s*)?as\s*(?:(?:not\s+)?materialized\s*)?\(", re.IGNORECASE
)
_FENCE = re.compile(r"```\w*\n?(.*?)(?:```|\Z)", re.DOTALL)
_END = re.compile(r"'[^']*'|\"[^\"]*\"|(;|```|\n\s*\n)")
_NOT_CODE = re.compile(r"'[^']*'|\"[^\"]*\"|`[^`]*`|\[[^\]]*\]|--[^\n]*|/\*.*?\*/", re.DOTALL)
_CLAUSES = r"from|where|group|order|having|limit|offset|join|left|inner|cross|on|and|or|union|intersect|except|window"
# Capitalised words are not matched: prose after an answer begins with one.
_CONTINUED = re.compile(rf"(?:{_CLAUSES}|{_CLAUSES.upper()})\b|[),]")
_SELECT = re.compile(r"\bselect\b", re.IGNORECASE)
_OPEN_END = re.compile(
    r"(?:\b(?:union|all|intersect|except|select|from|where|and|or|by|on|join)|,)\s*\Z", re.IGNORECASE
)

Value = int | float | str | bytes | None
Rows = list[tuple[Value, ...]]


class SqlExecution:
    """Compares the rows that two queries return. Each test row needs ``database``, an SQL script that creates it."""

    def __init__(self) -> None:
        self._databases: dict[str, bytes] = {}

    def score(self, answer: str, expected: str, record: Record) -> bool:
        """Whether the first query in ``answer`` returns the expected rows; in their order if that query sorts them.

        Raises:
            DataError: The row has no usable ``database``, or its expected query fails.
        """
        script = record.get("database")
        if not isinstance(script, str):
            raise DataError("dataset.metric: sql_execution needs the field `database`, an SQL script, in each test row")
        expected_query = first_query(expected)
        wanted = self._run(script, expected_query)
        if wanted is None:
            raise DataError(f"dataset.metric: the expected query of a test row fails: {expected_query}")
        actual = self._run(script, first_query(answer))
        if actual is None:
            return False
        ordered = re.search(r"\border\s+by\b", _outermost(expected_query)[0], re.IGNORECASE) is not None
        return same_rows(wanted, actual, ordered=ordered)

    def _run(self, script: str, query: str) -> Rows | None:
        """All rows that the query returns; None if it fails, exceeds a limit or does anything but read."""
        connection = sqlite3.connect(":memory:")
        try:
            # Otherwise sorting would use the disk to get around the heap limit.
            connection.execute("PRAGMA temp_store = MEMORY")
            connection.execute(f"PRAGMA hard_heap_limit = {_MAX_HEAP_BYTES}")
            connection.deserialize(self._built(script))
            connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _MAX_VALUE_BYTES)
            connection.setlimit(sqlite3.SQLITE_LIMIT_COLUMN, _MAX_COLUMNS)
            connection.setlimit(sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH, _MAX_PATTERN_BYTES)
            checks, deadline = 0, time.monotonic() + _MAX_SECONDS

            def permit(action: int, _: str | None, name: str | None, *__: str | None) -> int:
                # Each nested WITH can double the compiler's work, before the first step runs.
                late = time.monotonic() > deadline
                denied = action == sqlite3.SQLITE_FUNCTION and (name or "").lower() in _DENIED_FUNCTIONS
                return sqlite3.SQLITE_DENY if late or denied or action not in _ALLOWED else sqlite3.SQLITE_OK

            def too_long() -> bool:
                nonlocal checks
                checks += 1
                return checks > _MAX_CHECKS or time.monotonic() > deadline

            connection.set_authorizer(permit)
            connection.set_progress_handler(too_long, _STEPS_BETWEEN_CHECKS)
            return _bounded(connection.execute(query))
        except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError, MemoryError):
            return None
        finally:
            connection.close()

    def _built(self, script: str) -> bytes:
        if script not in self._databases:
            connection = sqlite3.connect(":memory:")
            try:
                connection.executescript(script)
                self._databases[script] = connection.serialize()
            except (sqlite3.Error, ValueError, MemoryError) as error:
                raise DataError(f"dataset.metric: a test row's `database` script fails: {error}") from error
            finally:
                connection.close()
        return self._databases[script]


def _bounded(cursor: sqlite3.Cursor) -> Rows | None:
    rows: Rows = []
    taken = 0
    for row in cursor:
        taken += _ROW_BYTES + sum(
            # A character may take four bytes.
            _VALUE_BYTES + (4 * len(value) if isinstance(value, str | bytes) else 0)
            for value in row
        )
        if taken > _MAX_RESULT_BYTES:
            return None
        rows.append(row)
    return rows


def first_query(text: str) -> str:
    """The first SELECT (or WITH) statement in ``text``, without code fences and without what follows its semicolon.

    A blank line ends it too, unless it is inside parentheses or the next line continues the statement.
    """
    text = text[:_MAX_QUERY_CHARACTERS]
    fence = _FENCE.search(text)
    if fence is not None and _QUERY.search(fence[1]):
        text = fence[1]
    match = _QUERY.search(text)
    if match is None:
        return text
    statement = text[match.start() :]
    ends = (end.start() for end in _END.finditer(statement) if end[1] and not _continues(statement, end))
    return statement[: next(ends, len(statement))].strip()


def _continues(statement: str, end: re.Match[str]) -> bool:
    if end[1].strip():
        return False
    before, depth = _outermost(statement[: end.start()])
    after = statement[end.end() :].lstrip()
    if depth > 0 or _CONTINUED.match(after) or _OPEN_END.search(before):
        return True
    return _SELECT.match(after) is not None and _SELECT.search(before) is None


def _outermost(query: str) -> tuple[str, int]:
    """``query`` without strings, comments and what is in parentheses; and the number of parentheses left open."""
    depth = 0
    kept = []
    for character in _NOT_CODE.sub(" x ", query):
        depth += (character == "(") - (character == ")")
        if depth <= 0 and character not in "()":
            kept.append(character)
    return "".join(kept), max(depth, 0)


def same_rows(expected: Rows, actual: Rows, *, ordered: bool) -> bool:
    """Whether two results are equal: as sequences if ``ordered``, else as multisets; floats within 1e-6 relative."""
    if len(expected) != len(actual):
        return False
    if not ordered:
        expected, actual = sorted(expected, key=_sort_key), sorted(actual, key=_sort_key)
    return all(
        len(left) == len(right) and all(map(_same_value, left, right))
        for left, right in zip(expected, actual, strict=True)
    )


def _same_value(left: Value, right: Value) -> bool:
    if isinstance(left, int | float) and isinstance(right, int | float):
        return math.isclose(left, right, rel_tol=1e-6, abs_tol=1e-9)
    return type(left) is type(right) and bool(left == right)


def _sort_key(row: tuple[Value, ...]) -> list[tuple[str, float, str]]:
    """Sorts numbers by value, everything else by type and text, so that any two rows can be compared."""
    return [
        ("number", round(float(value), 6), "")
        if isinstance(value, int | float)
        else (type(value).__name__, 0.0, str(value))
        for value in row
    ]
