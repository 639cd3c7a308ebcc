"""Question and answer of a raw row."""

from __future__ import annotations

from macft.data.formats import FIELDS, Record, parse
from macft.errors import DataError

_NO_ANSWER = "dataset.metric: a test row is a text, without a right answer; set training.metric_rows=0"


def expected_text(record: Record) -> str:
    """The right answer: the completion, or the last message.

    Raises:
        DataError: The row is a text, which has no answer, or is in none of the formats.
    """
    conversation = parse(record)
    if isinstance(conversation, str):
        raise DataError(_NO_ANSWER)
    return str(conversation.messages[-1].get("content", ""))


def question_text(record: Record) -> str:
    """The question as a person would read it: the prompt, or the message before the answer; empty for a text row."""
    conversation = parse(record)
    if isinstance(conversation, str) or len(conversation.messages) < 2:
        return ""
    return str(conversation.messages[-2].get("content", ""))


def with_answer(record: Record, answer: str) -> Record:
    """The row as messages that end with ``answer``; fields that no row format reads stay.

    Raises:
        DataError: As :func:`expected_text`.
    """
    conversation = parse(record)
    if isinstance(conversation, str):
        raise DataError(_NO_ANSWER)
    others = {name: value for name, value in record.items() if name not in FIELDS}
    last = {"role": conversation.messages[-1].get("role"), "content": answer}
    return {**others, "messages": [*conversation.messages[:-1], last], "tools": conversation.tools}
