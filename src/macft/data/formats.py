"""Row formats: how a raw record becomes a conversation or a text, and how that becomes tokens.

The formats are mlx-lm's: ``prompt`` and ``completion``, ``messages``, both with optional ``tools``, and ``text``. To
add one, write a function that turns a record into a :class:`Conversation` or a ``str`` and list it in :data:`FORMATS`;
tokenising, prompt masking, generation, metrics and ``dataset.columns`` use it from there.

Shapes: n is the number of tokens in a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from macft.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Record = Mapping[str, Any]
"""A row as read from a file or the Hub: values of JSON, by field name."""
Message = Mapping[str, Any]
"""As in OpenAI's chat API: ``role``, ``content``, and what else the chat template reads."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages of which the last is the answer to learn, and descriptions of tools for the chat template."""

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] | None = None


class Tokenizer(Protocol):
    """What is used here of mlx-lm's ``TokenizerWrapper``."""

    @property
    def eos_token_id(self) -> int:
        """The token that ends a text."""
        ...

    def encode(self, text: str) -> Sequence[int]:
        """The tokens of ``text``."""
        ...

    def apply_chat_template(
        self,
        conversation: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        return_dict: bool,
    ) -> Sequence[int]:
        """The tokens of a conversation, with the start of an answer if ``add_generation_prompt``."""
        ...


@dataclass(frozen=True)
class RowFormat:
    """A format: records that have all ``fields`` are read by ``parse``; ``optional`` names the other fields it reads.

    ``parse`` returns a conversation, or a plain text. It raises DataError, without the row's number, for a field of the
    wrong type.
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

    Raises:
        DataError: The record is in none of the formats, or a field has the wrong type.
    """
    for row_format in FORMATS:
        if all(name in record for name in row_format.fields):
            return row_format.parse(record)
    *others, last = [" and ".join(f"`{name}`" for name in row_format.fields) for row_format in FORMATS]
    have = ", ".join(sorted(record)) or "none"
    raise DataError(f"it needs {', '.join(others)}, or {last}, but has {have}; dataset.columns renames fields")


def tokenize(record: Record, tokenizer: Tokenizer, *, mask_prompt: bool) -> Row:
    """The record's tokens, equal to those that mlx-lm's own dataset classes make.

    Args:
        mask_prompt: Whether only the answer is a target: the last message.

    Raises:
        DataError: The record is in none of the formats, a field has the wrong type, the chat template or the tokenizer
            refuses it, or ``mask_prompt`` is set and it has no prompt.
    """
    match parse(record):
        case Conversation() as conversation:
            return _tokenize_conversation(conversation, tokenizer, mask_prompt)
        case text:
            if mask_prompt:
                raise DataError("dataset.mask_prompt: text rows have no prompt to mask; set it to false")
            return _tokenize_text(text, tokenizer)


def prompt_tokens(record: Record, tokenizer: Tokenizer) -> list[int]:
    """The prompt for generating an answer: all messages but the last, and the start of the answer.

    Raises:
        DataError: The record is a text, which has no prompt.
    """
    conversation = parse(record)
    if isinstance(conversation, str):
        raise DataError("dataset.metric: text rows have no question to answer; set training.metric_rows=0")
    prompt = Conversation(conversation.messages[:-1], conversation.tools)
    return _apply_template(prompt, tokenizer, opens_answer=True)


def _parse_prompt_completion(record: Record) -> Conversation:
    for name in ("prompt", "completion"):
        if not isinstance(record[name], str):
            raise DataError(f"`{name}` must be a string, not {type(record[name]).__name__}")
    messages = [{"role": "user", "content": record["prompt"]}, {"role": "assistant", "content": record["completion"]}]
    return Conversation(messages, record.get("tools"))


def _parse_messages(record: Record) -> Conversation:
    messages = record["messages"]
    if not isinstance(messages, list) or not messages or not all(isinstance(item, dict) for item in messages):
        raise DataError('`messages` must be a list of objects such as {"role": "user", "content": "..."}')
    if any("role" not in item for item in messages):
        raise DataError("`messages`: a message has no `role`")
    return Conversation(messages, record.get("tools"))


def _parse_text(record: Record) -> str:
    text = record["text"]
    if not isinstance(text, str):
        raise DataError(f"`text` must be a string, not {type(text).__name__}")
    return text


FORMATS = (
    RowFormat(("prompt", "completion"), _parse_prompt_completion, optional=("tools",)),
    RowFormat(("messages",), _parse_messages, optional=("tools",)),
    RowFormat(("text",), _parse_text),
)
"""In the order in which they are tried, which is mlx-lm's: a record may have the fields of several."""
FIELDS = tuple(dict.fromkeys(name for row_format in FORMATS for name in (*row_format.fields, *row_format.optional)))
"""All fields that a format reads, each once."""


def _tokenize_text(text: str, tokenizer: Tokenizer) -> Row:
    try:
        tokens = list(tokenizer.encode(text))
    except Exception as error:  # for instance half a surrogate pair, valid in JSON but not in UTF-8
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"the tokenizer refuses `text`: {reason}") from error
    if not tokens or tokens[-1] != tokenizer.eos_token_id:
        tokens.append(tokenizer.eos_token_id)
    return _row(tokens, 0)


def _tokenize_conversation(conversation: Conversation, tokenizer: Tokenizer, mask_prompt: bool) -> Row:
    messages = conversation.messages
    tokens = _apply_template(conversation, tokenizer)
    if not mask_prompt:
        return _row(tokens, 0)
    if len(messages) < 2:
        raise DataError("`messages` has only one message; dataset.mask_prompt needs a prompt before the answer")
    opens_answer = messages[-1].get("role") == "assistant"
    prompt = Conversation(messages[:-1], conversation.tools)
    return _row(tokens, len(_apply_template(prompt, tokenizer, opens_answer=opens_answer)))


def _apply_template(conversation: Conversation, tokenizer: Tokenizer, *, opens_answer: bool = False) -> list[int]:
    try:
        tokens = tokenizer.apply_chat_template(
            conversation.messages, tools=conversation.tools, add_generation_prompt=opens_answer, return_dict=False
        )
    except Exception as error:  # a template is the model's own code and may raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"the model's chat template refuses it: {reason}") from error
    return [int(token) for token in tokens]


def _row(tokens: Sequence[int], prompt_length: int) -> Row:
    import numpy as np  # here, because the settings read FIELDS and must load fast

    return Row(np.asarray(tokens, dtype=np.int32), prompt_length)
