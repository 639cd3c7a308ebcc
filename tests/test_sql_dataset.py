"""What the SQL dataset promises: reproducible, without leaks between splits, and not to be had by trivial answers."""

from __future__ import annotations

import json
import re
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from mlx_lm.utils import load_tokenizer

import macft.data.builtin.sql as builtin
from macft.data.builtin.sql.generate import SEED, SIZES, WEIGHTS, make_split, write
from macft.data.settings import SourceConfig
from macft.data.sources import read_source
from macft.data.tokenize import tokenize
from macft.evaluation.record import expected_text, question_text
from macft.evaluation.sql_execution import SqlExecution

SPLITS = ("train", "valid", "test")
JUDGED = ("valid", "test")
JUDGE = SqlExecution()


def is_right(row: dict[str, Any], answer: str) -> bool:
    return JUDGE.score(answer, expected_text(row), row)


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict[str, Any]]]:
    """The committed rows by split, read as a run reads them."""
    found = read_source(SourceConfig(path="builtin:sql"))
    return {split: [dict(row.record) for row in rows] for split, rows in found.items()}


def schema(row: dict[str, Any]) -> str:
    """The tables and columns, as the question shows them."""
    return question_text(row).rsplit("\n", 1)[0]


def tables(row: dict[str, Any]) -> list[str]:
    """The names of the tables; the one asked about is first."""
    return [line.split("(")[0] for line in schema(row).splitlines()]


def trivial_queries(row: dict[str, Any]) -> dict[str, str]:
    """What can be answered without reading the question, from the schema alone."""
    table = tables(row)[0]
    _, name, category, number = re.findall(r"\w+", schema(row).splitlines()[0])[1:5]
    return {
        "everything": f"SELECT * FROM {table}",
        "names": f"SELECT {name} FROM {table}",
        "first name": f"SELECT {name} FROM {table} LIMIT 1",
        "number of rows": f"SELECT COUNT(*) FROM {table}",
        "categories": f"SELECT DISTINCT {category} FROM {table}",
        "largest number": f"SELECT MAX({number}) FROM {table}",
        "constant": "SELECT 1",
        "nothing": f"SELECT {name} FROM {table} WHERE 0",
        "no query": question_text(row),
    }


@pytest.mark.slow
def test_regenerating_gives_the_committed_bytes(tmp_path: Path) -> None:
    write(tmp_path)
    for split in SPLITS:
        assert (tmp_path / f"{split}.jsonl").read_bytes() == (
            Path(builtin.__file__).parent / f"{split}.jsonl"
        ).read_bytes()


def test_another_seed_gives_other_rows() -> None:
    assert make_split("valid", 50, SEED) == make_split("valid", SIZES["valid"], SEED)[:50]
    assert make_split("valid", 50, SEED) != make_split("valid", 50, SEED + 1)


def test_splits_share_no_table_schema_or_question(rows: dict[str, list[dict[str, Any]]]) -> None:
    for left, right in (("train", "valid"), ("train", "test"), ("valid", "test")):
        assert {schema(row) for row in rows[left]}.isdisjoint(schema(row) for row in rows[right])
        assert {question_text(row) for row in rows[left]}.isdisjoint(question_text(row) for row in rows[right])
        assert {tables(row)[0] for row in rows[left]}.isdisjoint(tables(row)[0] for row in rows[right])


@pytest.mark.parametrize("split", SPLITS)
def test_no_question_stands_twice_in_a_split(rows: dict[str, list[dict[str, Any]]], split: str) -> None:
    assert len({question_text(row) for row in rows[split]}) == len(rows[split]) == SIZES[split]


@pytest.mark.parametrize("split", SPLITS)
def test_every_split_has_every_family(rows: dict[str, list[dict[str, Any]]], split: str) -> None:
    families = {row["family"] for row in rows[split]}
    assert len(families) >= 12
    assert families == set(WEIGHTS)


@pytest.mark.parametrize("split", JUDGED)
def test_every_expected_query_is_right(rows: dict[str, list[dict[str, Any]]], split: str) -> None:
    assert [row["family"] for row in rows[split] if not is_right(row, expected_text(row))] == []


@pytest.mark.slow
@pytest.mark.parametrize("split", JUDGED)
def test_trivial_answers_are_nearly_always_wrong(rows: dict[str, list[dict[str, Any]]], split: str) -> None:
    right: dict[str, int] = {}
    for row in rows[split]:
        for kind, query in trivial_queries(row).items():
            right[kind] = right.get(kind, 0) + is_right(row, query)
    shares = {kind: count / len(rows[split]) for kind, count in right.items()}
    assert {kind: share for kind, share in shares.items() if share >= 0.05} == {}
    # These are right now and then, which shows that the queries above are no typing errors.
    assert shares["categories"] > 0
    assert shares["number of rows"] > 0


@pytest.mark.parametrize("split", JUDGED)
def test_the_answer_of_another_row_is_wrong(rows: dict[str, list[dict[str, Any]]], split: str) -> None:
    found = rows[split]
    right = sum(is_right(row, expected_text(other)) for row, other in zip(found, [*found[1:], found[0]], strict=True))
    assert right == 0


@pytest.mark.parametrize("split", JUDGED)
def test_the_schema_shown_is_that_of_the_database(rows: dict[str, list[dict[str, Any]]], split: str) -> None:
    for row in rows[split]:
        connection = sqlite3.connect(":memory:")
        try:
            connection.executescript(row["database"])
            shown = []
            for table in tables(row):
                columns = [column[1] for column in connection.execute(f"PRAGMA table_info({table})")]
                shown.append(f"{table}({', '.join(columns)})")
        finally:
            connection.close()
        assert "\n".join(shown) == schema(row)


def test_training_rows_hold_no_database(rows: dict[str, list[dict[str, Any]]]) -> None:
    assert not any("database" in row for row in rows["train"])


@pytest.mark.slow
@pytest.mark.parametrize("split", SPLITS)
def test_rows_are_at_most_128_tokens(rows: dict[str, list[dict[str, Any]]], bundled_model: Path, split: str) -> None:
    tokenizer = load_tokenizer(bundled_model)
    found = [tokenize(row, tokenizer, mask_prompt=True) for row in rows[split]]
    assert max(len(row.tokens) for row in found) <= 128
    assert min(row.target_tokens for row in found) > 3


def test_every_line_is_plain_ascii_json() -> None:
    for split in SPLITS:
        data = (Path(builtin.__file__).parent / f"{split}.jsonl").read_bytes()
        assert data.isascii()
        assert data.endswith(b"}\n")
        assert all(isinstance(json.loads(line), dict) for line in data.splitlines())
