"""Conversations as tokens, by the model's chat template.

Templates differ in how they want tool calls. Which way a template wants them is found out by using it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from macft.data.conversation import Conversation, Message
from macft.errors import DataError


class Tokenizer(Protocol):
    """What is used here of mlx-lm's ``TokenizerWrapper``."""

    @property
    def eos_token_id(self) -> int:
        """The token that ends a text."""
        ...

    @property
    def bos_token_id(self) -> int | None:
        """The token that begins a text; None where the model has none."""
        ...

    @property
    def has_chat_template(self) -> bool:
        """Whether the model comes with a chat template."""
        ...

    def encode(self, text: str) -> Sequence[int]:
        """The tokens of ``text``, with those that the tokenizer adds to each text."""
        ...

    def apply_chat_template(
        self,
        conversation: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        tokenize: bool,
        return_dict: bool,
    ) -> Any:
        """A conversation as tokens or as text, with the start of an answer if ``add_generation_prompt``."""
        ...


def template_tokens(conversation: Conversation, tokenizer: Tokenizer, *, opens_answer: bool = False) -> list[int]:
    """The tokens of a conversation by the model's chat template, with the start of an answer if ``opens_answer``.

    Raises:
        DataError: There is no chat template, or it refuses the conversation.
    """
    if not tokenizer.has_chat_template:
        raise DataError(
            "the model's tokenizer has no chat template, which rows with a prompt or messages need; take the model's "
            "instruct (chat) version, or write rows with `text`"
        )
    if any("tool_calls" in message for message in conversation.messages):
        conversation = _as_it_wants_calls(conversation, tokenizer, opens_answer)
    return [int(token) for token in _apply(conversation, tokenizer, opens_answer, tokenize=True)]


def _apply(conversation: Conversation, tokenizer: Tokenizer, opens_answer: bool, *, tokenize: bool) -> Any:
    try:
        return tokenizer.apply_chat_template(
            conversation.messages,
            tools=conversation.tools,
            add_generation_prompt=opens_answer,
            tokenize=tokenize,
            return_dict=False,
        )
    except Exception as error:  # a template is the model's own code and may raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"the model's chat template refuses it: {reason}") from error


def _as_it_wants_calls(conversation: Conversation, tokenizer: Tokenizer, opens_answer: bool) -> Conversation:
    """The conversation with its tool calls as the template takes them.

    Most templates write the arguments of a call as JSON, and need no content beside it. Some add content and arguments
    to a text, so that they need both as strings; or they print the arguments as they are, which is Python's notation
    for an object.
    """
    for candidate in _candidates(conversation):
        try:
            text = _apply(candidate, tokenizer, opens_answer, tokenize=False)
        except DataError:
            continue
        arguments = [call["arguments"] for call in _functions(candidate) if call["arguments"]]
        if all(isinstance(given, str) or str(given) not in text for given in arguments):
            return candidate
    return conversation


def _candidates(conversation: Conversation) -> Iterator[Conversation]:
    yield conversation
    filled = [{"content": "", **message} for message in conversation.messages]
    yield replace(conversation, messages=filled)
    encoded = [_with_encoded_arguments(message) for message in conversation.messages]
    yield replace(conversation, messages=encoded)
    yield replace(conversation, messages=[{"content": "", **message} for message in encoded])


def _functions(conversation: Conversation) -> Iterator[Mapping[str, Any]]:
    for message in conversation.messages:
        for call in message.get("tool_calls", ()):
            yield call.get("function", call)


def _with_encoded_arguments(message: Message) -> Message:
    if "tool_calls" not in message:
        return message
    calls = []
    for call in message["tool_calls"]:
        function = call.get("function", call)
        encoded = {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}
        calls.append({**call, "function": encoded} if "function" in call else encoded)
    return {**message, "tool_calls": calls}
