"""The answer in a text: without the model's thinking, and without what the chat template writes around an answer.

A template may write an empty thinking block or a channel's name in front of an answer. The model learns to generate it,
so that a generated text is never equal to the bare answer of a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from macft.data.formats import Record
from macft.data.template import Tokenizer
from macft.data.tokenize import tokenize
from macft.errors import DataError
from macft.evaluation.record import with_answer

# For a tokenizer that doesn't list them: many templates write them as plain text.
_COMMON_MARKS = ("<think>", "</think>")
_PLACEHOLDER = "an answer"


class AnswerTokenizer(Tokenizer, Protocol):
    """What is used here, beyond that, of mlx-lm's ``TokenizerWrapper``."""

    has_thinking: bool
    think_start: str
    think_end: str
    eos_token_ids: set[int]

    def get_added_vocab(self) -> Mapping[str, int]:
        """The tokens that stand for themselves, such as ``<|im_end|>``."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of ``tokens``, special tokens included."""
        ...


@dataclass(frozen=True)
class AnswerForm:
    """Where the answer stands in the texts of one model.

    Attributes:
        marks: Pairs of texts that begin and end the model's thinking.
        opening: What the template writes before an answer, after the generation prompt and without thinking.
        closing: What it writes after an answer, before the token that ends the turn.
        is_marked: Whether a token of its own is in ``opening``: it then begins the answer wherever it stands, for a
            model may write something else first (gpt-oss: another channel).
    """

    marks: tuple[tuple[str, str], ...] = (_COMMON_MARKS,)
    opening: str = ""
    closing: str = ""
    is_marked: bool = False

    @classmethod
    def of(cls, tokenizer: AnswerTokenizer, record: Record) -> AnswerForm:
        """The form of this tokenizer's chat template; ``record`` is any row with a question and an answer."""
        marks = (_COMMON_MARKS, (tokenizer.think_start, tokenizer.think_end))
        plain = cls(tuple(dict.fromkeys(marks if tokenizer.has_thinking else marks[:1])))
        try:
            row = tokenize(with_answer(record, _PLACEHOLDER), tokenizer, mask_prompt=True)
        except DataError:  # told where the row itself is read
            return plain
        target = [int(token) for token in row.tokens[row.prompt_length :]]
        end = next((i for i, token in enumerate(target) if token in tokenizer.eos_token_ids), len(target))
        before, found, after = tokenizer.decode(target[:end]).partition(_PLACEHOLDER)
        if not found:  # the template changes what it is given
            return plain
        opening = plain.answer(before) or ""
        is_marked = any(token in opening for token in tokenizer.get_added_vocab())
        return cls(plain.marks, opening, after.strip(), is_marked)

    def opens_thinking(self, prompt: str) -> bool:
        """Whether ``prompt`` ends at the beginning of a thinking block."""
        return prompt.rstrip().endswith(tuple(start for start, _ in self.marks))

    def answer(self, text: str, *, is_thinking: bool = False) -> str | None:
        """The answer in ``text``, without white space around it; None if the text ends within a thinking block.

        Args:
            is_thinking: Whether the text begins within a thinking block.
        """
        for start, end in self.marks:
            begun, ended = text.find(start), text.find(end)
            if ended >= 0 and not 0 <= begun < ended:  # the block was begun before the text
                text, is_thinking = text[ended + len(end) :], False
            while start in text:
                before, _, thought = text.partition(start)
                _, found, after = thought.partition(end)
                if not found:
                    return None
                text = before + after
        if is_thinking:
            return None
        text = text.strip()
        text = text.rpartition(self.opening)[2] if self.is_marked else text.removeprefix(self.opening)
        return text.strip().removesuffix(self.closing).strip()
