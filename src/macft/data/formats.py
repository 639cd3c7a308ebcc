"""mlx-lm's dataset formats as rows of tokens: ``text``, ``prompt``/``completion``, ``messages`` with ``tools``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from macft.errors import DataError


@dataclass(frozen=True, slots=True)
class Row:
    """One row: ``tokens`` (n,) int32. The first ``prompt_length`` of them, and the very first one, are no targets."""

    tokens: NDArray[np.int32]
    prompt_length: int

    @property
    def target_tokens(self) -> int:
        """How many tokens the model is trained to predict."""
        return max(0, len(self.tokens) - max(self.prompt_length, 1))


def rename_columns(record: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The record with our field names; raises KeyError for a column it doesn't have."""
    renamed = {name: value for name, value in record.items() if name not in columns.values()}
    return renamed | {ours: record[theirs] for ours, theirs in columns.items()}


def tokenize(record: Mapping[str, Any], tokenizer: Any, *, mask_prompt: bool) -> Row:
    """The record's tokens exactly as mlx-lm's own dataset classes make them.

    Raises:
        DataError: none of the formats fits, a field has the wrong type, or the chat template refuses the row.
    """
    if "prompt" in record and "completion" in record:
        return _chat(_turns(record), record.get("tools"), tokenizer, mask_prompt)
    if "messages" in record:
        return _chat(_messages(record), record.get("tools"), tokenizer, mask_prompt)
    if "text" in record:
        if mask_prompt:
            raise DataError("dataset.mask_prompt: text rows have no prompt to mask; set it to false")
        return _text(record["text"], tokenizer)
    fields = ", ".join(sorted(record)) or "none"
    raise DataError(
        f"it needs `messages`, `prompt` and `completion`, or `text`, but has {fields}; dataset.columns renames fields"
    )


def prompt_tokens(record: Mapping[str, Any], tokenizer: Any) -> list[int]:
    """What the model is given to answer: all but the last message, with the opening of the answer.

    Raises:
        DataError: a text row, which asks nothing.
    """
    if "prompt" in record and "completion" in record:
        messages = _turns(record)
    elif "messages" in record:
        messages = _messages(record)
    else:
        raise DataError("dataset.metric: text rows have no question to answer; set training.metric_rows=0")
    return _template(messages[:-1], record.get("tools"), tokenizer, opens_answer=True)


def _turns(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    for name in ("prompt", "completion"):
        if not isinstance(record[name], str):
            raise DataError(f"`{name}` must be a string, not {type(record[name]).__name__}")
    return [{"role": "user", "content": record["prompt"]}, {"role": "assistant", "content": record["completion"]}]


def _messages(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    messages = record["messages"]
    if not isinstance(messages, list) or not messages or not all(isinstance(item, dict) for item in messages):
        raise DataError('`messages` must be a list of objects such as {"role": "user", "content": "..."}')
    if any("role" not in item for item in messages):
        raise DataError("`messages`: a message has no `role`")
    return messages


def _text(text: Any, tokenizer: Any) -> Row:
    if not isinstance(text, str):
        raise DataError(f"`text` must be a string, not {type(text).__name__}")
    try:
        tokens = list(tokenizer.encode(text))
    except Exception as error:  # half a surrogate pair, for instance, which JSON can spell and UTF-8 can't
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"the tokenizer refuses `text`: {reason}") from error
    if not tokens or tokens[-1] != tokenizer.eos_token_id:
        tokens.append(tokenizer.eos_token_id)
    return Row(np.asarray(tokens, dtype=np.int32), 0)


def _chat(messages: list[dict[str, Any]], tools: Any, tokenizer: Any, mask_prompt: bool) -> Row:
    tokens = np.asarray(_template(messages, tools, tokenizer), dtype=np.int32)
    if not mask_prompt:
        return Row(tokens, 0)
    if len(messages) < 2:
        raise DataError("`messages` has only one message; dataset.mask_prompt needs a prompt before the answer")
    answers = messages[-1].get("role") == "assistant"
    return Row(tokens, len(_template(messages[:-1], tools, tokenizer, opens_answer=answers)))


def _template(messages: list[dict[str, Any]], tools: Any, tokenizer: Any, *, opens_answer: bool = False) -> list[int]:
    try:
        tokens = tokenizer.apply_chat_template(
            messages, tools=tools, add_generation_prompt=opens_answer, return_dict=False
        )
    except Exception as error:  # templates are the model's own code and raise what they like
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"the model's chat template refuses it: {reason}") from error
    return [int(token) for token in tokens]
