"""Makes the SQL dataset: ``python -m macft.data.builtin.sql.generate``. The same seed gives the same bytes.

Every split has schemas of its own, so that a test question is never about a table seen in training. A row is a chat: a
short system message, the schema with the question, and the query. Test and validation rows also hold ``database``, an
SQL script that builds the tables, so that answers can be judged by running them.
"""

from __future__ import annotations

import argparse
import json
import random
import sqlite3
from pathlib import Path
from typing import Any

from macft.data.builtin.sql import domains
from macft.data.builtin.sql.questions import WEIGHTS, Question, ask
from macft.data.builtin.sql.tables import make_table

SIZES = {"train": 2000, "valid": 200, "test": 200}
SYSTEM = "Write SQLite."
SEED = 2026


def _answerable(question: Question) -> bool:
    """Whether the query runs and returns something, and something else than the whole table's names would."""
    connection = sqlite3.connect(":memory:")
    try:
        connection.executescript(question.script)
        rows = connection.execute(question.query).fetchall()
        return bool(rows) and rows[0][0] is not None
    finally:
        connection.close()


def make_split(name: str, size: int, seed: int) -> list[dict[str, Any]]:
    """The rows of one split, none twice."""
    random_ = random.Random(f"{seed}-{name}")
    lines = {"train": domains.TRAIN, "valid": domains.VALID, "test": domains.TEST}[name].strip().splitlines()
    families, weights = list(WEIGHTS), list(WEIGHTS.values())
    rows: list[dict[str, Any]] = []
    seen: set[tuple[str, str]] = set()
    while len(rows) < size:
        family = random_.choices(families, weights)[0]
        question = ask(family, make_table(lines[len(rows) % len(lines)], random_), random_)
        if (question.schema, question.text) in seen or not _answerable(question):
            continue
        seen.add((question.schema, question.text))
        messages = [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": f"{question.schema}\n{question.text}"},
            {"role": "assistant", "content": question.query},
        ]
        row: dict[str, Any] = {"messages": messages, "family": family}
        if name != "train":
            row["database"] = question.script
        rows.append(row)
    return rows


def write(folder: Path, seed: int = SEED) -> None:
    """Writes ``train.jsonl``, ``valid.jsonl`` and ``test.jsonl``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, size in SIZES.items():
        lines = [json.dumps(row) + "\n" for row in make_split(name, size, seed)]
        (folder / f"{name}.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Makes the SQL dataset.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write to")
    parser.add_argument("--seed", type=int, default=SEED)
    arguments = parser.parse_args()
    write(arguments.out, arguments.seed)
