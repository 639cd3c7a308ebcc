"""Question and answer of a raw row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from macft.errors import DataError


def expected_text(record: Mapping[str, Any]) -> str:
    """The right answer: the completion, or the last message.

    Raises:
        DataError: the row has neither.
    """
    if "completion" in record:
        return str(record["completion"])
    if record.get("messages"):
        return str(record["messages"][-1].get("content", ""))
    raise DataError("dataset.metric: a test row has neither `completion` nor `messages`, so no right answer")


def question_text(record: Mapping[str, Any]) -> str:
    """The question as a person would read it: the prompt, or the last message before the answer."""
    if "prompt" in record:
        return str(record["prompt"])
    messages = record.get("messages") or []
    return str(messages[-2].get("content", "")) if len(messages) > 1 else ""
