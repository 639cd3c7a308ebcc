"""Questions about a table and the queries that answer them, in families and in many phrasings."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from macft.data.builtin.sql import domains
from macft.data.builtin.sql.tables import Table, literal, plural_of

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
class Question:
    """A question over a schema with its query; ``script`` builds the database."""

    schema: str
    text: str
    query: str
    script: str


class _Asker:
    """Asks about one table. Each family method returns (question, query)."""

    def __init__(self, table: Table, random_: random.Random):
        self.t = table
        self.random = random_
        self.shown = table.name_column
        self.names = {"name": "names", "title": "titles", "model": "models", "code": "codes"}.get(
            table.name_column, plural_of(table.name_column)
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
    parent = "owners" if plural_of(category) == plural else plural_of(category)
    towns = random_.sample(domains.PLACES, len(table.values))
    ids = {value: number + 1 for number, value in enumerate(table.values)}
    child_rows = ", ".join(f"({row[0]}, {literal(row[1])}, {ids[row[2]]}, {row[3]})" for row in table.rows)
    parent_rows = ", ".join(
        f"({ids[value]}, {literal(value)}, {literal(town)})" for value, town in zip(table.values, towns, strict=True)
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
