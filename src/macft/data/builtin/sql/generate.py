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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from macft.data.builtin.sql import domains

SIZES = {"train": 2000, "valid": 200, "test": 200}
SYSTEM = "Write SQLite."
SEED = 2026

# How often each family of questions occurs; the hard ones are rarer.
WEIGHTS = {
    "lookup": 10,
    "equals": 12,
    "compare": 12,
    "count": 4,
    "count_equals": 9,
    "count_compare": 8,
    "aggregate": 9,
    "aggregate_equals": 6,
    "extreme": 10,
    "top": 6,
    "distinct": 4,
    "group": 5,
    "between": 5,
    "prefix": 3,
    "both": 5,
    "either": 4,
    "sorted": 4,
    "join": 3,
}


@dataclass(frozen=True)
class Table:
    """A table with its data. ``numbers`` are the two number columns; no two rows share a name or a number."""

    entity: str
    name: str
    name_column: str
    category: str
    values: tuple[str, ...]
    numbers: tuple[str, str]
    rows: tuple[tuple[Any, ...], ...]

    @property
    def schema(self) -> str:
        """As the question shows it."""
        return f"{self.name}(id, {self.name_column}, {self.category}, {', '.join(self.numbers)})"

    def script(self) -> str:
        """SQL that builds the table."""
        first, second = self.numbers
        kinds = f"id INTEGER, {self.name_column} TEXT, {self.category} TEXT, {first} INTEGER, {second} INTEGER"
        values = ", ".join(f"({', '.join(map(_literal, row))})" for row in self.rows)
        return f"CREATE TABLE {self.name} ({kinds}); INSERT INTO {self.name} VALUES {values};"


@dataclass(frozen=True)
class Question:
    """A question over a schema with its query; ``script`` builds the database."""

    schema: str
    text: str
    query: str
    script: str


def _literal(value: Any) -> str:
    return "'" + value.replace("'", "''") + "'" if isinstance(value, str) else str(value)


def _plural(noun: str) -> str:
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("s", "x", "ch", "sh")) else "s")


def make_table(line: str, random_: random.Random) -> Table:
    """A table of 8 to 12 rows for one line of :mod:`domains`."""
    entity, named, category, *numbers = (part.strip() for part in line.split(";"))
    name_column, pool = named.split()
    category_column, values = (part.strip() for part in category.split("="))
    chosen_values = values.split()
    count = random_.randint(8, 12)
    names = random_.sample(_names(pool, random_), count)
    columns, limits = zip(*(number.split() for number in numbers), strict=True)
    data = []
    for limit in limits:
        low, high = map(int, limit.split("-"))
        # Distinct where the range allows it, so that an extreme is never a tie.
        whole = range(low, high + 1)
        data.append(random_.sample(whole, count) if len(whole) >= count else random_.choices(whole, k=count))
    rows = []
    for index in range(count):
        value = chosen_values[index] if index < len(chosen_values) else random_.choice(chosen_values)
        rows.append((index + 1, names[index], value, data[0][index], data[1][index]))
    return Table(
        entity,
        _plural(entity),
        name_column,
        category_column,
        tuple(chosen_values),
        (columns[0], columns[1]),
        tuple(rows),
    )


def _names(pool: str, random_: random.Random) -> list[str]:
    if pool == "work":
        return [f"{first} {last}" for first in domains.FIRST_WORDS for last in domains.LAST_WORDS]
    if pool == "code":
        return [f"{a}{b}{n}" for a in "ABCDEFGHK" for b in "LMNPQRST" for n in random_.sample(range(10), 3)]
    return {"person": domains.PEOPLE, "pet": domains.PETS, "place": domains.PLACES, "thing": domains.THINGS}[pool]


class _Asker:
    """Asks about one table. Each family method returns (question, query)."""

    def __init__(self, table: Table, random_: random.Random):
        self.t = table
        self.random = random_
        self.shown = table.name_column
        self.names = {"name": "names", "title": "titles", "model": "models", "code": "codes"}.get(
            table.name_column, _plural(table.name_column)
        )

    def pick(self, *phrasings: str) -> str:
        """One of several ways to say it."""
        return self.random.choice(phrasings)

    def number(self) -> tuple[str, list[int]]:
        """A number column and its values."""
        which = self.random.randrange(2)
        return self.t.numbers[which], [row[3 + which] for row in self.t.rows]

    def value(self) -> str:
        """A category that occurs."""
        return str(self.random.choice(self.t.rows)[2])

    def all(self) -> str:
        """A way to ask for a list of names."""
        names, plural = self.names, self.t.name
        return self.pick(
            f"List the {names} of {plural}",
            f"Show the {names} of all {plural}",
            f"Give me the {names} of {plural}",
            f"What are the {names} of {plural}",
            f"Find the {names} of {plural}",
            f"Which {plural} are there",
            f"I need the {names} of {plural}",
            f"Name all {plural}",
        )

    def where_equals(self, value: str) -> tuple[str, str]:
        """A filter on the category: words and SQL."""
        c = self.t.category
        words = self.pick(
            f"whose {c} is {value}",
            f"with {c} {value}",
            f"where the {c} is {value}",
            f"that have {c} {value}",
            f"having {value} as {c}",
            f"with {value} as their {c}",
        )
        return words, f"{c} = '{value}'"

    def where_compare(self) -> tuple[str, str]:
        """A filter on a number: words and SQL."""
        column, values = self.number()
        limit = sorted(values)[self.random.randint(2, len(values) - 3)]
        operator, words = self.random.choice(
            [
                (">", ("over", "above", "more than", "greater than", "higher than")),
                ("<", ("under", "below", "less than", "lower than", "smaller than")),
                (">=", ("at least", "not less than")),
                ("<=", ("at most", "not more than")),
            ]
        )
        word = self.random.choice(words)
        return (
            self.pick(
                f"with {column} {word} {limit}",
                f"whose {column} is {word} {limit}",
                f"where the {column} is {word} {limit}",
                f"having {column} {word} {limit}",
            ),
            f"{column} {operator} {limit}",
        )

    def superlative(self, column: str) -> tuple[str, str]:
        """Words for the largest or smallest value of a column, and the SQL direction."""
        largest = self.random.random() < 0.6
        if column in domains.SUPERLATIVES:
            return domains.SUPERLATIVES[column][0 if largest else 1], "DESC" if largest else "ASC"
        return f"{'highest' if largest else 'lowest'} {column}", "DESC" if largest else "ASC"

    def lookup(self) -> tuple[str, str]:
        """One value of one row."""
        row = self.random.choice(self.t.rows)
        place = self.random.choice([2, 3, 4])
        column, name = (self.t.category, *self.t.numbers)[place - 2], row[1]
        text = self.pick(
            f"What is the {column} of {name}?",
            f"Tell me the {column} of the {self.t.entity} {name}.",
            f"What {column} does {name} have?",
            f"Look up the {column} of {name}.",
            f"Which {column} belongs to {name}?",
            f"Find {name}'s {column}.",
            f"{name}: what is the {column}?",
        )
        return text, f"SELECT {column} FROM {self.t.name} WHERE {self.shown} = '{name}'"

    def equals(self) -> tuple[str, str]:
        """Names by category."""
        words, condition = self.where_equals(self.value())
        return f"{self.all()} {words}.", f"SELECT {self.shown} FROM {self.t.name} WHERE {condition}"

    def compare(self) -> tuple[str, str]:
        """Names by a number."""
        words, condition = self.where_compare()
        return f"{self.all()} {words}.", f"SELECT {self.shown} FROM {self.t.name} WHERE {condition}"

    def _how_many(self, words: str = "") -> str:
        plural, space = self.t.name, " " if words else ""
        return self.pick(
            f"How many {plural} are there{space}{words}?",
            f"Count the {plural}{space}{words}.",
            f"What is the number of {plural}{space}{words}?",
            f"Give the number of {plural}{space}{words}.",
            f"How many {plural}{space}{words} do we have?",
            f"Tell me how many {plural} there are{space}{words}.",
        )

    def count(self) -> tuple[str, str]:
        """All rows."""
        return self._how_many(), f"SELECT COUNT(*) FROM {self.t.name}"

    def count_equals(self) -> tuple[str, str]:
        """Rows of a category."""
        words, condition = self.where_equals(self.value())
        return self._how_many(words), f"SELECT COUNT(*) FROM {self.t.name} WHERE {condition}"

    def count_compare(self) -> tuple[str, str]:
        """Rows by a number."""
        words, condition = self.where_compare()
        return self._how_many(words), f"SELECT COUNT(*) FROM {self.t.name} WHERE {condition}"

    def _aggregate(self, words: str) -> tuple[str, str]:
        column, _ = self.number()
        function, adjectives = self.random.choice(
            [
                ("AVG", ("average", "mean")),
                ("MAX", ("highest", "largest", "maximum")),
                ("MIN", ("lowest", "smallest", "minimum")),
                ("SUM", ("total", "summed")),
            ]
        )
        adjective = self.random.choice(adjectives)
        text = self.pick(
            f"What is the {adjective} {column} of {words}?",
            f"Find the {adjective} {column} of {words}.",
            f"Give me the {adjective} {column} of {words}.",
            f"Show the {adjective} {column} among {words}.",
            f"Compute the {adjective} {column} of {words}.",
            f"Tell me the {adjective} {column} for {words}.",
        )
        return text, f"SELECT {function}({column}) FROM {self.t.name}"

    def aggregate(self) -> tuple[str, str]:
        """A function of a column."""
        return self._aggregate(self.pick("all ", "the ", "") + self.t.name)

    def aggregate_equals(self) -> tuple[str, str]:
        """A function of a column over a category."""
        words, condition = self.where_equals(self.value())
        text, query = self._aggregate(f"{self.t.name} {words}")
        return text, f"{query} WHERE {condition}"

    def extreme(self) -> tuple[str, str]:
        """The row with the largest or smallest number."""
        column, _ = self.number()
        words, direction = self.superlative(column)
        e, shown = self.t.entity, self.shown
        subject = f"{words} {e}" if column in domains.SUPERLATIVES else f"{e} with the {words}"
        text = self.pick(
            f"Which is the {subject}?",
            f"What is the {shown} of the {subject}?",
            f"Name the {subject}.",
            f"Find the {shown} of the {subject}.",
            f"Show the {shown} of the {subject}.",
            f"Tell me the {shown} of the {subject}.",
            f"Who or what is the {subject}?",
        )
        return text, f"SELECT {shown} FROM {self.t.name} ORDER BY {column} {direction} LIMIT 1"

    def top(self) -> tuple[str, str]:
        """The few rows with the largest or smallest numbers, in order."""
        column, _ = self.number()
        words, direction = self.superlative(column)
        n = self.random.randint(2, 5)
        plural, names = self.t.name, self.names
        subject = f"{n} {words} {plural}" if column in domains.SUPERLATIVES else f"{n} {plural} with the {words}"
        text = self.pick(
            f"List the {names} of the {subject}.",
            f"Show the {subject}.",
            f"What are the {names} of the {subject}?",
            f"Name the {subject}.",
            f"Give me the {names} of the {subject}.",
            f"Which are the {subject}?",
        )
        return text, f"SELECT {self.shown} FROM {plural} ORDER BY {column} {direction} LIMIT {n}"

    def distinct(self) -> tuple[str, str]:
        """The categories that occur."""
        c, plural = self.t.category, self.t.name
        text = self.pick(
            f"What are the different {c} values of {plural}?",
            f"List each {c} once.",
            f"Show all distinct {c} values.",
            f"Which {c} values occur among the {plural}?",
            f"Give me every {c} without repeats.",
            f"List the unique {c} values of {plural}.",
        )
        return text, f"SELECT DISTINCT {c} FROM {plural}"

    def group(self) -> tuple[str, str]:
        """Rows in each category."""
        c, plural = self.t.category, self.t.name
        text = self.pick(
            f"How many {plural} are there for each {c}?",
            f"Count the {plural} per {c}.",
            f"Show each {c} and its number of {plural}.",
            f"For every {c}, how many {plural} are there?",
            f"Give the number of {plural} by {c}.",
            f"List each {c} with the count of {plural}.",
        )
        return text, f"SELECT {c}, COUNT(*) FROM {plural} GROUP BY {c}"

    def between(self) -> tuple[str, str]:
        """Names by a range."""
        column, values = self.number()
        ordered = sorted(values)
        low, high = ordered[self.random.randint(1, 3)], ordered[self.random.randint(-4, -2)]
        words = self.pick(
            f"with {column} between {low} and {high}",
            f"whose {column} is between {low} and {high}",
            f"with {column} from {low} to {high}",
            f"having {column} between {low} and {high}",
        )
        return (
            f"{self.all()} {words}.",
            f"SELECT {self.shown} FROM {self.t.name} WHERE {column} BETWEEN {low} AND {high}",
        )

    def prefix(self) -> tuple[str, str]:
        """Names by their first letter."""
        letter = self.random.choice(self.t.rows)[1][0]
        shown, plural = self.shown, self.t.name
        text = self.pick(
            f"{self.all()} whose {shown} starts with {letter}.",
            f"Which {plural} have a {shown} starting with {letter}?",
            f"Show {plural} whose {shown} begins with {letter}.",
            f"Find the {self.names} that start with {letter}.",
            f"List all {self.names} beginning with {letter}.",
            f"Give me every {shown} that begins with the letter {letter}.",
        )
        return text, f"SELECT {shown} FROM {plural} WHERE {shown} LIKE '{letter}%'"

    def both(self) -> tuple[str, str]:
        """Names by category and number."""
        words, condition = self.where_equals(self.value())
        more_words, more = self.where_compare()
        return (
            f"{self.all()} {words} and {more_words}.",
            f"SELECT {self.shown} FROM {self.t.name} WHERE {condition} AND {more}",
        )

    def either(self) -> tuple[str, str]:
        """Names by one of two categories."""
        left, right = self.random.sample(sorted({str(row[2]) for row in self.t.rows}), 2)
        c = self.t.category
        words = self.pick(
            f"whose {c} is {left} or {right}",
            f"with {c} {left} or {right}",
            f"where the {c} is either {left} or {right}",
            f"that have {c} {left} or {right}",
        )
        return (
            f"{self.all()} {words}.",
            f"SELECT {self.shown} FROM {self.t.name} WHERE {c} = '{left}' OR {c} = '{right}'",
        )

    def sorted(self) -> tuple[str, str]:
        """All names in the order of a number."""
        column, _ = self.number()
        direction, words = self.random.choice(
            [
                ("ASC", ("from lowest to highest", "in ascending order of")),
                ("DESC", ("from highest to lowest", "in descending order of")),
            ]
        )
        word = self.random.choice(words)
        order = f"{word} {column}" if word.endswith("of") else f"by {column} {word}"
        return f"{self.all()} {order}.", f"SELECT {self.shown} FROM {self.t.name} ORDER BY {column} {direction}"


def _join(table: Table, random_: random.Random) -> Question:
    """A question over two tables: the category becomes a table of its own, with a town for each value."""
    category, plural = table.category, table.name
    parent = "owners" if _plural(category) == plural else _plural(category)
    towns = random_.sample(domains.PLACES, len(table.values))
    ids = {value: number + 1 for number, value in enumerate(table.values)}
    child_rows = ", ".join(f"({row[0]}, {_literal(row[1])}, {ids[row[2]]}, {row[3]})" for row in table.rows)
    parent_rows = ", ".join(
        f"({ids[value]}, {_literal(value)}, {_literal(town)})" for value, town in zip(table.values, towns, strict=True)
    )
    number, shown = table.numbers[0], table.name_column
    script = (
        f"CREATE TABLE {plural} (id INTEGER, {shown} TEXT, {category}_id INTEGER, {number} INTEGER); "
        f"INSERT INTO {plural} VALUES {child_rows}; "
        f"CREATE TABLE {parent} (id INTEGER, label TEXT, town TEXT); INSERT INTO {parent} VALUES {parent_rows};"
    )
    town = towns[ids[random_.choice(table.rows)[2]] - 1]
    asker = _Asker(table, random_)
    text = f"{asker.all()} " + asker.pick(
        f"whose {category} is in {town}.",
        f"with a {category} in {town}.",
        f"where the town of the {category} is {town}.",
        f"whose {category} has {town} as town.",
    )
    query = f"SELECT {shown} FROM {plural} JOIN {parent} ON {category}_id = {parent}.id WHERE town = '{town}'"
    return Question(f"{plural}(id, {shown}, {category}_id, {number})\n{parent}(id, label, town)", text, query, script)


def ask(family: str, table: Table, random_: random.Random) -> Question:
    """A question of ``family`` about ``table``."""
    if family == "join":
        return _join(table, random_)
    method: Callable[[], tuple[str, str]] = getattr(_Asker(table, random_), family)
    text, query = method()
    return Question(table.schema, text, query, table.script())


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
