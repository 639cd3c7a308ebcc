"""Tables with random rows, made from the lines of :mod:`~macft.data.builtin.sql.domains`."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from macft.data.builtin.sql import domains


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
        values = ", ".join(f"({', '.join(map(literal, row))})" for row in self.rows)
        return f"CREATE TABLE {self.name} ({kinds}); INSERT INTO {self.name} VALUES {values};"


def literal(value: Any) -> str:
    return "'" + value.replace("'", "''") + "'" if isinstance(value, str) else str(value)


def plural_of(noun: str) -> str:
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
        plural_of(entity),
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
