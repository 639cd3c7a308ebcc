"""The SQL dataset and execution accuracy."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.utils import load_tokenizer

import macft.data.builtin.sql as builtin
from macft.data.builtin.sql.generate import write
from macft.data.builtin.sql.questions import WEIGHTS
from macft.errors import ConfigError, DataError
from macft.evaluation.metrics import metric
from macft.evaluation.record import expected_text, question_text

FOLDER = Path(builtin.__file__).parent
SQL = metric("sql_execution")


def rows(split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / f"{split}.jsonl").read_text().splitlines()]


def test_the_generator_makes_the_committed_bytes(tmp_path: Path) -> None:
    write(tmp_path)
    for split in ("train", "valid", "test"):
        assert (tmp_path / f"{split}.jsonl").read_bytes() == (FOLDER / f"{split}.jsonl").read_bytes()


def test_sizes_and_families() -> None:
    assert [len(rows(split)) for split in ("train", "valid", "test")] == [2000, 200, 200]
    assert {row["family"] for row in rows("test")} == set(WEIGHTS) == {row["family"] for row in rows("train")}


def test_splits_share_neither_tables_nor_questions() -> None:
    tables = {split: {question_text(row).split("(")[0] for row in rows(split)} for split in ("train", "valid", "test")}
    schemas = {split: {question_text(row).split("\n")[0] for row in rows(split)} for split in tables}
    questions = {split: {question_text(row) for row in rows(split)} for split in tables}
    for groups in (tables, schemas, questions):
        assert not groups["train"] & groups["test"]
        assert not groups["train"] & groups["valid"]
        assert not groups["valid"] & groups["test"]
    assert len(tables["train"]) >= 60
    assert len(tables["test"]) >= 15
    assert len(questions["train"]) == 2000


def test_rows_are_short(bundled_model: Path) -> None:
    tokenizer = load_tokenizer(bundled_model)
    lengths = [len(tokenizer.apply_chat_template(row["messages"], return_dict=False)) for row in rows("train")]
    assert max(lengths) <= 128
    assert sum(lengths) / len(lengths) < 80


@pytest.mark.parametrize("split", ["valid", "test"])
def test_every_expected_query_is_right_and_trivial_ones_are_not(split: str) -> None:
    found = rows(split)
    assert all(SQL.score(row, expected_text(row)) for row in found)
    for trivial in ("SELECT * FROM {t}", "SELECT name FROM {t}", "SELECT COUNT(*) FROM {t}"):
        right = sum(SQL.score(row, trivial.format(t=question_text(row).split("(")[0])) for row in found)
        assert right / len(found) < 0.1


DATABASE = "CREATE TABLE t (id INTEGER, name TEXT, x REAL); INSERT INTO t VALUES (1,'a',1.5),(2,'b',2.5),(3,'c',0.1);"


def record(query: str) -> dict[str, Any]:
    return {"completion": query, "prompt": "?", "database": DATABASE}


@pytest.mark.parametrize(
    ("expected", "answer", "right"),
    [
        ("SELECT name FROM t", "SELECT name FROM t ORDER BY x", True),
        ("SELECT name FROM t ORDER BY x", "SELECT name FROM t ORDER BY x DESC", False),
        ("SELECT name FROM t ORDER BY x", "select NAME from T order by x asc", True),
        ("SELECT AVG(x) FROM t", "SELECT SUM(x) / 3 FROM t", True),
        ("SELECT COUNT(*) FROM t", "SELECT 3.0", True),
        ("SELECT COUNT(*) FROM t", "SELECT '3'", False),
        ("SELECT name FROM t WHERE id = 2", "```sql\nSELECT name FROM t WHERE x = 2.5;\n```\nThis works because", True),
        ("SELECT name FROM t WHERE id = 2", "The query is: SELECT name FROM t WHERE id = 2; SELECT 1", True),
        ("SELECT name FROM t WHERE id = 2", "WITH u AS (SELECT * FROM t) SELECT name FROM u WHERE id = 2", True),
        ("SELECT name FROM t WHERE id = 2", "SELECT name, id FROM t WHERE id = 2", False),
        ("SELECT name FROM t", "SELECT DISTINCT 'a' FROM t", False),
        ("SELECT name FROM t", "b", False),
        ("SELECT name FROM t", "", False),
        ("SELECT name FROM t", "DROP TABLE t", False),
        ("SELECT name FROM t", "ATTACH DATABASE '/tmp/x' AS y", False),
        ("SELECT name FROM t", "PRAGMA table_info(t)", False),
        ("SELECT name FROM t", "SELECT load_extension('x')", False),
        ("SELECT name FROM t", "SELECT name FROM sqlite_master; SELECT name FROM t", False),
    ],
)
def test_answers_are_judged_by_what_they_return(expected: str, answer: str, right: bool) -> None:
    assert SQL.score(record(expected), answer) is right


def test_an_endless_query_is_wrong_not_endless() -> None:
    started = time.monotonic()
    endless = "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c) SELECT MAX(n) FROM c"
    assert not SQL.score(record("SELECT 1"), endless)
    assert not SQL.score(record("SELECT 1"), "SELECT hex(zeroblob(900000000))")
    assert time.monotonic() - started < 60  # far beyond what the step limit allows, yet not for ever


@settings(max_examples=200, deadline=None)
@given(
    st.text(max_size=80) | st.text(alphabet="SELECT FROM WHERE*();'\"tnamex=1,\n`", max_size=60).map("SELECT ".__add__)
)
def test_any_text_is_right_or_wrong_and_changes_nothing(text: str) -> None:
    assert SQL.score(record("SELECT 12345"), text) in (True, False)
    assert SQL.score(record("SELECT COUNT(*) FROM t"), "SELECT 3")


def test_rows_that_cannot_be_judged_are_named() -> None:
    with pytest.raises(DataError, match="`database`"):
        SQL.score({"prompt": "?", "completion": "SELECT 1"}, "SELECT 1")
    with pytest.raises(DataError, match="expected query of a test row fails"):
        SQL.score(record("SELECT nothing FROM nowhere"), "SELECT 1")
    with pytest.raises(DataError, match="script fails"):
        SQL.score({**record("SELECT 1"), "database": "CREATE NONSENSE"}, "SELECT 1")


def test_exact_match_ignores_white_space_only() -> None:
    exact = metric("exact_match")
    chat = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "two  words"}]}
    assert exact.score(chat, " two words\n")
    assert not exact.score(chat, "Two words")


def test_an_unknown_metric_has_a_nearest_name() -> None:
    with pytest.raises(ConfigError, match="did you mean 'sql_execution'"):
        metric("sql_exec")
