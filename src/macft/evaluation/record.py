"""Question and answer of a raw row."""

from __future__ import annotations

from macft.data.conversation import Conversation
from macft.data.formats import FIELDS, Record, parse
from macft.errors import DataError


def expected_text(record: Record) -> str:
    """The right answer: the completion, or the assistant's last message; empty if that is only a tool call.

    Raises:
        DataError: The row is a text, which has no answer, or is in none of the formats.
    """
    return str(_answered(record).messages[-1].get("content", ""))


def question_text(record: Record) -> str:
    """The question as a person would read it: the prompt, or the message before the answer; empty for a text row."""
    conversation = parse(record)
    if isinstance(conversation, str):
        return ""
    return str(conversation.until_answer().messages[-2].get("content", ""))


def with_answer(record: Record, answer: str) -> Record:
    """The row as messages that end with ``answer``; fields that no row format reads stay.

    Raises:
        DataError: As :func:`expected_text`.
    """
    conversation = _answered(record)
    others = {name: value for name, value in record.items() if name not in FIELDS}
    last = {"role": "assistant", "content": answer}
    return {**others, "messages": [*conversation.messages[:-1], last], "tools": conversation.tools}


def _answered(record: Record) -> Conversation:
    conversation = parse(record)
    if isinstance(conversation, str):
        raise DataError("dataset.metric: a test row is a text, without a right answer; set training.metric_rows=0")
    return conversation.until_answer()
