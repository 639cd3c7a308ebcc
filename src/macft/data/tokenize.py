"""Rows as tokens: the chat template, the plain text, and where the prompt ends.

The tokens are those that mlx-lm's own dataset classes make, and so is the mask where the chat template begins an answer
as it begins a generated one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from macft.data.conversation import Conversation
from macft.data.formats import Record, Row, parse
from macft.data.template import Tokenizer, template_tokens, why_refused
from macft.errors import DataError

Remark = Callable[[str], None]
"""Takes what a user should know about a row: what follows after '3 of 7 rows'."""

_USUAL_ROLES = {"system", "developer", "user", "assistant", "tool"}
_OTHER_ANSWERS = ("0", "?")


def tokenize(record: Record, tokenizer: Tokenizer, *, mask_prompt: bool, remark: Remark = lambda _: None) -> Row:
    """The record's tokens.

    Args:
        mask_prompt: Whether only the answer is a target: the last message of the assistant. Messages after it are left
            out, for they would be trained on otherwise.
        remark: Called with what was done to the row that a user would not expect.

    Raises:
        DataError: The record is in none of the formats, a field has the wrong type, the chat template or the tokenizer
            refuses it, or ``mask_prompt`` is set and it has no prompt or no answer.
    """
    found = parse(record)
    if isinstance(found, str):
        if mask_prompt:
            raise DataError("text rows have no prompt to mask; set dataset.mask_prompt=false")
        tokens = text_tokens(found, tokenizer)
        if not tokens or tokens[-1] != tokenizer.eos_token_id:
            tokens.append(tokenizer.eos_token_id)
        return _row(tokens, 0)
    if found.renamed_roles:
        remark(f"have roles named {', '.join(sorted(found.renamed_roles))}, read as user, assistant or tool")
    if unknown := {str(message["role"]) for message in found.messages} - _USUAL_ROLES:
        remark(f"have roles named {', '.join(sorted(unknown))}, which the model's chat template may not know")
    if not mask_prompt:
        return _row(template_tokens(found, tokenizer), 0)
    try:
        answered = found.until_answer()
    except DataError as error:
        raise DataError(f"{error}; dataset.mask_prompt needs a prompt and an answer") from error
    if len(answered.messages) < len(found.messages):
        remark("go on after the assistant's last message; dataset.mask_prompt leaves the rest out")
    tokens = template_tokens(answered, tokenizer)
    return _row(tokens, _prompt_length(answered, tokens, tokenizer, remark))


def prompt_tokens(record: Record, tokenizer: Tokenizer) -> list[int]:
    """The prompt for generating an answer: the messages before the assistant's last one, and the start of an answer.

    Raises:
        DataError: The record is a text, or has no prompt or no answer.
    """
    found = parse(record)
    if isinstance(found, str):
        raise DataError("dataset.metric: text rows have no question to answer; use dataset.metric=perplexity, or none")
    return template_tokens(found.until_answer().prompt(), tokenizer, opens_answer=True)


def text_tokens(text: str, tokenizer: Tokenizer) -> list[int]:
    """The tokens of a text without a chat template; the token that begins a text comes once.

    Texts made with a chat template often begin with that token already, and many tokenizers add it to each text.
    """
    try:
        tokens = [int(token) for token in tokenizer.encode(text)]
    except Exception as error:  # each kind of tokenizer raises its own
        raise DataError(f"the tokenizer refuses the text: {why_refused(error, text)}") from error
    begin = tokenizer.bos_token_id
    while begin is not None and tokens[:2] == [begin, begin]:
        del tokens[0]
    return tokens


def _prompt_length(answered: Conversation, tokens: list[int], tokenizer: Tokenizer, remark: Remark) -> int:
    """How many of ``tokens``, those of a conversation that ends in an answer, are its prompt.

    The prompt is what the model gets when it answers: the messages before, and the template's start of an answer. It
    ends where its tokens and ``tokens`` part.

    - Mostly it is the beginning of ``tokens``: all of it is masked, as mlx-lm does.
    - The start of a generated answer may be more than what stands before a written one (``<think>``), or be split into
      other tokens. The mask ends where they part, so that no token of the answer is lost.
    - The template may write earlier messages otherwise once the answer is there (reasoning before a tool call is left
      out), so that they part before the answer. Then the answer begins where other answers in its place would.
    """
    prompt = answered.prompt()
    opened = template_tokens(prompt, tokenizer, opens_answer=True)
    shared = common_prefix(opened, tokens)
    if shared == len(opened):
        return shared
    if shared >= common_prefix(opened, template_tokens(prompt, tokenizer)):
        remark(
            "begin the answer otherwise than the chat template begins a generated one; the mask ends where they part, "
            "so that the whole answer is trained on"
        )
        return shared
    remark(
        "have messages that the chat template writes otherwise once the answer is there; the mask ends where the "
        "answer begins"
    )
    others = [
        replace(prompt, messages=[*prompt.messages, {"role": "assistant", "content": text}]) for text in _OTHER_ANSWERS
    ]
    return min(common_prefix(template_tokens(other, tokenizer), tokens) for other in others)


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens two sequences have in common at the beginning."""
    for index, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return index
    return min(len(left), len(right))


def _row(tokens: Sequence[int], prompt_length: int) -> Row:
    return Row(np.asarray(tokens, dtype=np.int32), prompt_length)
