"""Execution accuracy (Yu et al. 2018, Spider): a query is right if it returns what the expected query returns.

Generated queries are untrusted. They run on a throw-away in-memory database that can only be read, for a limited
number of virtual-machine steps, and only their first rows are looked at.
"""

from __future__ import annotations

import math
import re
import sqlite3
import time
from collections.abc import Mapping
from typing import Any

from macft.errors import DataError
from macft.evaluation.record import expected_text

_MAX_ROWS = 1000
_MAX_QUERY_CHARACTERS = 4000
_STEPS_BETWEEN_CHECKS = 100
_MAX_CHECKS = 20_000
_MAX_SECONDS = 10.0
_MAX_VALUE_BYTES = 100_000
_MAX_COLUMNS = 50
_ALLOWED = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
_QUERY = re.compile(
    r"\bselect\b|\bwith\s+(?:recursive\s+)?\w+\s*(?:\([^)]*\)\s*)?as\s*(?:(?:not\s+)?materialized\s*)?\(", re.IGNORECASE
)
_FENCE = re.compile(r"```\w*\n?(.*?)(?:```|\Z)", re.DOTALL)
_END = re.compile(r"'[^']*'|\"[^\"]*\"|(;|```|\n\s*\n)")

Rows = list[tuple[Any, ...]]


class SqlExecution:
    """Needs, in each test row, ``database``: an SQL script that builds the database the question is about."""

    def __init__(self) -> None:
        self._databases: dict[str, bytes] = {}

    def score(self, record: Mapping[str, Any], generated: str) -> bool:
        """Whether the first query in ``generated`` returns the expected rows, in order where order is asked for.

        Raises:
            DataError: the row has no usable ``database``, or its expected query fails.
        """
        script = record.get("database")
        if not isinstance(script, str):
            raise DataError("dataset.metric: sql_execution needs the field `database`, an SQL script, in each test row")
        expected_query = first_query(expected_text(record))
        expected = self._run(script, expected_query)
        if expected is None:
            raise DataError(f"dataset.metric: the expected query of a test row fails: {expected_query}")
        found = self._run(script, first_query(generated))
        if found is None:
            return False
        ordered = re.search(r"\border\s+by\b", expected_query, re.IGNORECASE) is not None
        return same_rows(expected, found, ordered=ordered)

    def _run(self, script: str, query: str) -> Rows | None:
        """The query's rows, or None if it fails, takes too long or does anything but read."""
        connection = sqlite3.connect(":memory:")
        try:
            connection.deserialize(self._built(script))
            connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _MAX_VALUE_BYTES)
            connection.setlimit(sqlite3.SQLITE_LIMIT_COLUMN, _MAX_COLUMNS)
            connection.set_authorizer(
                lambda action, *_: sqlite3.SQLITE_OK if action in _ALLOWED else sqlite3.SQLITE_DENY
            )
            checks, deadline = 0, time.monotonic() + _MAX_SECONDS

            def too_long() -> bool:
                nonlocal checks
                checks += 1
                return checks > _MAX_CHECKS or time.monotonic() > deadline

            connection.set_progress_handler(too_long, _STEPS_BETWEEN_CHECKS)
            return connection.execute(query).fetchmany(_MAX_ROWS)
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
            except (sqlite3.Error, ValueError) as error:
                raise DataError(f"dataset.metric: a test row's `database` script fails: {error}") from error
            finally:
                connection.close()
        return self._databases[script]


def first_query(text: str) -> str:
    """The first SELECT (or WITH) statement in ``text``, without code fences and what follows its semicolon."""
    text = text[:_MAX_QUERY_CHARACTERS]
    fence = _FENCE.search(text)
    if fence is not None and _QUERY.search(fence[1]):
        text = fence[1]
    found = _QUERY.search(text)
    if found is None:
        return text
    statement = text[found.start() :]
    end = next((match.start() for match in _END.finditer(statement) if match[1]), len(statement))
    return statement[:end].strip()


def same_rows(expected: Rows, found: Rows, *, ordered: bool) -> bool:
    """Whether two results are equal: as sequences if ``ordered``, else as multisets; floats up to 1e-6 relative."""
    if len(expected) != len(found):
        return False
    if not ordered:
        expected, found = sorted(expected, key=_sort_key), sorted(found, key=_sort_key)
    return all(
        len(left) == len(right) and all(map(_same_value, left, right))
        for left, right in zip(expected, found, strict=True)
    )


def _same_value(left: Any, right: Any) -> bool:
    if isinstance(left, int | float) and isinstance(right, int | float):
        return math.isclose(left, right, rel_tol=1e-6, abs_tol=1e-9)
    return type(left) is type(right) and bool(left == right)


def _sort_key(row: tuple[Any, ...]) -> list[tuple[str, float, str]]:
    """Numbers by value, everything else by type and text; any two rows can be compared."""
    return [
        ("number", round(float(value), 6), "")
        if isinstance(value, int | float)
        else (type(value).__name__, 0.0, str(value))
        for value in row
    ]
