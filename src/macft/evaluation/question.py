"""What a model is asked for a row, and what it should answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from macft.data.formats import Record, Row, parse
from macft.data.tokenize import prompt_tokens
from macft.evaluation.record import expected_text, question_text

_LONGEST_BEGINNING = 64
"""Of a text that a model is to continue, in tokens."""
_SHORT_PROMPT = 512
"""Prompts up to this many tokens are preferred for samples, which should cost little time."""


@dataclass(frozen=True)
class RowQuestion:
    """A row as a question.

    Attributes:
        prompt: Tokens, with the start of an answer.
        text: The question as a person would read it.
        expected: The right answer, as it stands in the row.
        record: The row.
    """

    prompt: Sequence[int]
    text: str
    expected: str
    record: Record


def question(record: Record, tokenizer: Any) -> RowQuestion:
    """The question of a row that has an answer.

    Raises:
        DataError: The row is a text, or has no prompt or no answer.
    """
    prompt = prompt_tokens(record, tokenizer)
    return RowQuestion(prompt, question_text(record), expected_text(record), record)


def sample_question(record: Record, row: Row, tokenizer: Any) -> RowQuestion:
    """The question of any row: a text is to be continued from its beginning.

    Raises:
        DataError: The row has no prompt or no answer.
    """
    if not isinstance(parse(record), str):
        return question(record, tokenizer)
    tokens = [int(token) for token in row.tokens]
    begin = max(1, min(len(tokens) // 2, _LONGEST_BEGINNING))
    rest = [token for token in tokens[begin:] if token not in tokenizer.eos_token_ids]
    return RowQuestion(tokens[:begin], tokenizer.decode(tokens[:begin]), tokenizer.decode(rest), record)


def shortest_first(questions: Sequence[RowQuestion], count: int) -> list[RowQuestion]:
    """``count`` of ``questions`` in their order, rather those with prompts that are not long."""
    by_length = sorted(range(len(questions)), key=lambda i: (max(len(questions[i].prompt), _SHORT_PROMPT), i))
    return [questions[i] for i in sorted(by_length[:count])]
