"""Rows: as they are read, the formats they are written in, and as tokens.

The formats are mlx-lm's: ``prompt`` and ``completion``, ``messages``, both with optional ``tools``, and ``text``; then
ShareGPT's ``conversations`` and Alpaca's ``instruction`` and ``output``. To add one, write a function that turns a
record into a :class:`Conversation` or a ``str`` and list it in :data:`FORMATS`; tokenising, prompt masking, generation,
metrics and ``dataset.columns`` use it from there.

Shapes: n is the number of tokens in a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from macft.cli.shell import command
from macft.data.conversation import Conversation, conversation
from macft.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Record = Mapping[str, Any]
"""A row as read from a file or the Hub: values of JSON, by field name."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a record was read.

    Attributes:
        source: The source's path, as the user gave it.
        split: The split of the source in which it stands. A training row that is used for validation still stands in
            ``train``.
        row: Its number in the split, from 1.
        line: The line of the file where it begins, from 1; None where the file has no lines, or they are not known.
    """

    source: str
    split: str
    row: int
    line: int | None = None

    def __str__(self) -> str:
        """With the source, for an error."""
        return f"{self.source}, {self.split} {self.in_split}"

    @property
    def in_split(self) -> str:
        """The row's number, and the line where that is another number."""
        return f"row {self.row}" if self.line in (None, self.row) else f"row {self.row} (line {self.line})"


class RawRow(NamedTuple):
    """A record, and where it was read."""

    record: Record
    place: Place


@dataclass(frozen=True)
class RowFormat:
    """A format: records that have all ``fields`` are read by ``parse``; ``optional`` names the other fields it reads.

    ``parse`` gets a record without null fields. It returns a conversation, or a plain text. It raises DataError,
    without the row's number, for a field of the wrong type.
    """

    fields: tuple[str, ...]
    parse: Callable[[Record], Conversation | str]
    optional: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Row:
    """One tokenised row: ``tokens`` (n,) int32.

    The first ``prompt_length`` tokens, and the very first one in any case, are not targets.
    """

    tokens: NDArray[np.int32]
    prompt_length: int

    @property
    def target_tokens(self) -> int:
        """How many tokens the model is trained to predict."""
        return max(0, len(self.tokens) - max(self.prompt_length, 1))


def rename_columns(record: Record, columns: Mapping[str, str]) -> Record:
    """The record with macft's field names; ``columns`` maps a field name to the record's own name.

    Raises:
        KeyError: The record has no such column.
    """
    renamed = {name: value for name, value in record.items() if name not in columns.values()}
    return renamed | {field: record[column] for field, column in columns.items()}


def parse(record: Record) -> Conversation | str:
    """The record's conversation or text, by the first of :data:`FORMATS` whose fields it has.

    A null field is an absent field: files with columns have a value in each column.

    Raises:
        DataError: The record is in none of the formats, or a field has the wrong type.
    """
    present = {name: value for name, value in record.items() if value is not None}
    for row_format in FORMATS:
        if all(name in present for name in row_format.fields):
            try:
                return row_format.parse(present)
            except RecursionError as error:
                raise DataError("its values are nested too deeply") from error
    *others, last = [" and ".join(f"`{name}`" for name in row_format.fields) for row_format in FORMATS]
    have = ", ".join(sorted(present)) or "none"
    empty = ", ".join(sorted(name for name in record if name in FIELDS and name not in present))
    have += f" ({empty}: empty)" if empty else ""
    is_there = any(record.keys() >= set(row_format.fields) for row_format in FORMATS)
    advice = "write something there, or leave the row out" if is_there else _renaming(present)
    raise DataError(f"it needs {', '.join(others)}, or {last}, but has {have}; {advice}")


def _renaming(present: Record) -> str:
    """What to do about a record with these fields, in none of the formats."""
    if "chosen" not in present:
        guess = _guessed(present)
        return f"dataset.columns renames fields: {_columns(guess or {'prompt': 'COLUMN', 'completion': 'COLUMN'})}"
    whole = "text" if isinstance(present["chosen"], str) else "messages"
    field = "completion" if "prompt" in present else whole
    return f"there is no training on preferences; {_columns({field: 'chosen'})} trains on the chosen answers"


def _columns(columns: Mapping[str, str]) -> str:
    """``dataset.columns`` as it is typed."""
    pairs = ", ".join(
        f"{name}: {column if column.isidentifier() else repr(column)}" for name, column in columns.items()
    )
    return command(f"dataset.columns={{{pairs}}}")


def _guessed(present: Record) -> dict[str, str]:
    """Which of the record's fields are probably meant by ours; empty where that can't be told."""
    lower = {name.lower(): name for name in present}
    pair = {
        field: next((lower[word] for word in words if word in lower), None) for field, words in _ALSO_CALLED.items()
    }
    if pair["prompt"] and pair["completion"]:
        return {"prompt": pair["prompt"], "completion": pair["completion"]}
    return next(({field: name} for field in ("messages", "text") if (name := pair[field])), {})


def _string(record: Record, name: str) -> str:
    value = record[name]
    if not isinstance(value, str):
        raise DataError(f"`{name}` must be a string, not {type(value).__name__}: {str(value)[:40]}")
    return value


def _system(record: Record) -> list[Record]:
    """The system message of formats that have a field for it."""
    return [{"role": "system", "content": _string(record, "system")}] if record.get("system") else []


def _parse_prompt_completion(record: Record) -> Conversation:
    """Two strings, or two lists of messages, as TRL has them."""
    messages: list[Any] = []
    for name, role in (("prompt", "user"), ("completion", "assistant")):
        if isinstance(record[name], list) and record[name]:
            messages += record[name]
        else:
            messages.append({"role": role, "content": _string(record, name)})
    return conversation(messages, record.get("tools"), "`prompt` and `completion`")


def _parse_messages(record: Record) -> Conversation:
    return conversation(record["messages"], record.get("tools"), "`messages`")


def _parse_text(record: Record) -> str:
    return _string(record, "text")


def _parse_sharegpt(record: Record) -> Conversation:
    found = conversation(record["conversations"], record.get("tools"), "`conversations`")
    starts = found.messages[0]["role"] == "system"
    # Its names of roles are part of the format, not worth a note.
    return Conversation([*([] if starts else _system(record)), *found.messages], found.tools)


def _parse_alpaca(record: Record) -> Conversation:
    question = _string(record, "instruction")
    if record.get("input"):
        question += "\n\n" + _string(record, "input")
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": _string(record, "output")}]
    return Conversation([*_system(record), *messages])


FORMATS = (
    RowFormat(("prompt", "completion"), _parse_prompt_completion, optional=("tools",)),
    RowFormat(("messages",), _parse_messages, optional=("tools",)),
    RowFormat(("text",), _parse_text),
    RowFormat(("conversations",), _parse_sharegpt, optional=("tools", "system")),
    RowFormat(("instruction", "output"), _parse_alpaca, optional=("input", "system")),
)
"""In the order in which they are tried: mlx-lm's first, as it does. A record may have the fields of several."""
_ALSO_CALLED = {
    "prompt": "prompt question query instruction input problem user request source context".split(),
    "completion": "completion answer response output target solution assistant reply label answers".split(),
    "messages": "conversation chat dialogue dialog turns".split(),
    "text": "content body document sentence article".split(),
}
"""What other data sets call our fields, the likeliest first."""
FIELDS = tuple(dict.fromkeys(name for row_format in FORMATS for name in (*row_format.fields, *row_format.optional)))
"""All fields that a format reads, each once."""
