"""Checks of tokenised rows before a model's weights are loaded: what would train wrongly, and what may be meant.

What can't be right is a DataError. The rest are lines for the user, with how many rows they apply to and the first one.
Rows are looked at all together, as arrays; chat templates, which are slow, are tried on a few.

Shapes: R rows, T tokens of all rows together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from macft.data.conversation import Conversation
from macft.data.formats import FORMATS, Place, Record, Row, parse
from macft.data.load import Remarks, Split
from macft.data.template import template_tokens
from macft.errors import DataError

END_WITHIN = 4
"""Tokens at the end of a row among which the one that ends the answer is looked for: a template may write a line break
or two behind it."""
_SHORT = 16
"""Targets with more tokens than this have something in them."""
_ROWS_RENDERED = 4
_COLUMNS_NAMED = 5
_USUAL = ("role", "content", "name", "tool_call_id")
"""Keys of messages that say who speaks, which most templates write for some roles only."""
_DAMAGED = {"\x00": "NUL characters", "\ufffd": "the character U+FFFD, which stands for bytes that were no text"}
"""What a text has whose file was damaged, or decoded wrongly."""
_WORDS = {"tools": "tools", "tool_calls": "tool calls"}


@dataclass(frozen=True)
class _Part:
    """The rows of one source in a split."""

    rows: Sequence[Row]
    records: Sequence[Record]
    places: Sequence[Place]
    split: str


def check_rows(
    splits: Mapping[str, Split], tokenizer: Any, *, vocabulary: int | None, max_seq_length: int
) -> list[str]:
    """Lines for the user about the rows of ``splits``, by name.

    Args:
        tokenizer: The model's, as mlx-lm wraps it.
        vocabulary: How many tokens the model has embeddings for; None if that is not known.
        max_seq_length: Rows of this length were cut, and need no end.

    Raises:
        DataError: A row has a token that the model has no embedding for, or no training row has anything to learn but
            the end of an answer. The message names the first row.
    """
    parts = [part for name, split in splits.items() for part in _parts(split, name)]
    has_several = len({part.places[0].source for part in parts}) > 1
    notes, columns = [], dict[str, dict[str, None]]()
    for part in parts:
        source = part.places[0].source
        if vocabulary is not None:
            _check_vocabulary(part, tokenizer, vocabulary)
        remarks = Remarks()
        _check_targets(part, tokenizer, remarks)
        _check_ends(part, tokenizer, max_seq_length, remarks)
        _check_template(part, tokenizer, remarks)
        notes += remarks.lines(f"{source}, {part.split}" if has_several else part.split, len(part.rows))
        if not source.startswith("builtin:"):
            columns.setdefault(source, {}).update(dict.fromkeys(ignored_columns(part.records)))
    return notes + [_columns_line(source, list(names)) for source, names in columns.items() if names]


def ignored_columns(records: Sequence[Record]) -> list[str]:
    """The fields of ``records`` that their formats do not read, each once, in the order in which they are found."""

    @cache
    def unread(present: tuple[str, ...]) -> list[str]:
        used = next((item for item in FORMATS if set(item.fields) <= set(present)), None)
        return [name for name in present if used is None or name not in (*used.fields, *used.optional)]

    found: dict[str, None] = {}
    for record in records:
        found.update(dict.fromkeys(unread(tuple(name for name, value in record.items() if value is not None))))
    return list(found)


def _columns_line(source: str, names: list[str]) -> str:
    more = f" and {len(names) - _COLUMNS_NAMED} more" if len(names) > _COLUMNS_NAMED else ""
    return f"{source}: columns that are not trained on: {', '.join(names[:_COLUMNS_NAMED])}{more}"


def _parts(split: Split, name: str) -> list[_Part]:
    bounds = np.cumsum([0, *split.source_sizes])
    spans = [slice(*span) for span in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)]
    return [_Part(split.rows[span], split.records[span], split.places[span], name) for span in spans]


def _check_vocabulary(part: _Part, tokenizer: Any, vocabulary: int) -> None:
    beyond = _where(_reduced(np.maximum, [row.tokens for row in part.rows]) >= vocabulary)
    if not beyond:
        return
    tokens = part.rows[beyond[0]].tokens
    token = int(tokens[tokens >= vocabulary][0])
    raise DataError(
        f"{part.places[beyond[0]]}: token {token} ({_text(tokenizer, token)!r}) is beyond the model's vocabulary of "
        f"{vocabulary}; {len(beyond)} of {len(part.rows)} rows have such tokens; take the tokenizer that belongs to "
        "the model, or a model with embeddings for the tokens added"
    )


def _check_ends(part: _Part, tokenizer: Any, max_seq_length: int, remarks: Remarks) -> None:
    """Remarks on rows whose last target is not a token at which generation stops; white space may follow it."""
    stops = sorted(tokenizer.eos_token_ids)
    tails = [_targets(row)[-END_WITHIN:] for row in part.rows]
    is_ended = _reduced(np.logical_or, tails, lambda tokens: np.isin(tokens, stops))
    names = " or ".join(repr(_text(tokenizer, token)) for token in stops[:3]) or "it has none"
    line = f"do not end with a token that ends an answer ({names}), so the tuned model will not stop by itself"
    for index in _where(~is_ended):
        if len(part.rows[index].tokens) < max_seq_length:
            remarks.add(line, part.places[index])


def _check_targets(part: _Part, tokenizer: Any, remarks: Remarks) -> None:
    """Finds rows that have nothing to learn but the end of an answer, for the template has left the answer out."""
    short = [index for index, row in enumerate(part.rows) if row.target_tokens <= _SHORT]
    if not short:
        return
    targets = [_targets(part.rows[index]) for index in short]
    blank = sorted(_blank_tokens(np.unique(np.concatenate(targets)).tolist(), tokenizer))
    is_blank = _reduced(np.logical_and, targets, lambda tokens: np.isin(tokens, blank))
    found = [short[index] for index in _where(is_blank)]
    if len(found) == len(part.rows) and part.split == "train":
        text = tokenizer.decode(targets[0].tolist())
        raise DataError(
            f"{part.places[0]}: the target is only {text!r}, and no row has more: the answers are empty, or the "
            "model's chat template does not write them (it may know no tool calls)"
        )
    for index in found:
        remarks.add("have only the end of an answer as their target", part.places[index])


def _blank_tokens(tokens: Sequence[int], tokenizer: Any) -> set[int]:
    """Those of ``tokens`` that say nothing: white space, the end of an answer, the marks of an empty thought."""
    marks = {tokenizer.think_start, tokenizer.think_end} - {None}
    texts = {token: _text(tokenizer, token).strip() for token in tokens}
    ends = set(tokenizer.eos_token_ids)
    return {token for token, text in texts.items() if not text or token in ends or text in marks}


def _check_template(part: _Part, tokenizer: Any, remarks: Remarks) -> None:
    """Remarks on what the chat template leaves out, which a few rows show, and on texts that are empty or damaged.

    The former are tools, tool calls and other keys of messages.
    """
    having: dict[str, list[int]] = {}
    for index, record in enumerate(part.records):
        found = parse(record)
        _check_characters(found, part.places[index], remarks)
        if isinstance(found, str):
            continue
        if not part.rows[index].prompt_length and _is_silent(found.messages[-1]):  # else its target shows it
            remarks.add("have an empty answer", part.places[index])
        for name in _beside_text(found):
            having.setdefault(name, []).append(index)
    for name, indices in having.items():
        chosen = indices[:: max(1, len(indices) // _ROWS_RENDERED)][:_ROWS_RENDERED]
        if all(_is_left_out(name, part.records[index], tokenizer) for index in chosen):
            what = _WORDS.get(name, f"messages with `{name}`")
            for index in indices:
                remarks.add(f"have {what}, which the model's chat template leaves out", part.places[index])


def _check_characters(found: Conversation | str, place: Place, remarks: Remarks) -> None:
    """Remarks on a text that is probably not what was meant."""
    texts = [found] if isinstance(found, str) else [str(message.get("content", "")) for message in found.messages]
    for character, what in _DAMAGED.items():
        if any(character in text for text in texts):
            remarks.add(f"have {what}; is the file damaged?", place)


def _is_silent(message: Mapping[str, Any]) -> bool:
    return message["role"] == "assistant" and not message.get("tool_calls") and not str(message["content"]).strip()


def _beside_text(found: Conversation) -> list[str]:
    """What a conversation has beside roles and content: ``tools``, and keys of its messages."""
    names = dict.fromkeys(name for message in found.messages for name in message if name not in _USUAL)
    return [*(["tools"] if found.tools else []), *names]


def _is_left_out(name: str, record: Record, tokenizer: Any) -> bool:
    """Whether the record has the same tokens without what :func:`_beside_text` calls ``name``."""
    found = parse(record)
    if isinstance(found, str):
        return False
    without = replace(found, tools=None)
    if name != "tools":
        messages = [{key: value for key, value in item.items() if key != name} for item in found.messages]
        without = replace(found, messages=[{"content": "", **item} for item in messages])
    try:
        return template_tokens(found, tokenizer) == template_tokens(without, tokenizer)
    except DataError:  # a template may need what was taken away
        return False


def _targets(row: Row) -> NDArray[np.int32]:
    return row.tokens[max(row.prompt_length, 1) :]


def _where(is_so: NDArray[np.bool_]) -> list[int]:
    return [int(index) for index in np.flatnonzero(is_so)]


def _text(tokenizer: Any, token: int) -> str:
    return str(tokenizer.decode([token]))


def _reduced(
    function: np.ufunc,
    rows: Sequence[NDArray[np.int32]],
    of_tokens: Callable[[NDArray[np.int32]], NDArray[Any]] = lambda tokens: tokens,
) -> NDArray[Any]:
    """``function`` over the tokens of each row, or over what ``of_tokens`` makes of all of them (T,); (R,).

    No row may be empty. Thousands of rows are taken at once, and not all, for the memory.
    """
    done = []
    for start in range(0, len(rows), 4096):
        some = rows[start : start + 4096]
        starts = np.cumsum([0, *(len(row) for row in some[:-1])])
        done.append(function.reduceat(of_tokens(np.concatenate(some)), starts))
    return np.concatenate(done)
