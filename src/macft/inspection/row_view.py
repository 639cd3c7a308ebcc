"""One row as text: its prompt, its target, and how it ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from macft.data.checks import END_WITHIN
from macft.data.formats import Place, Row


@dataclass(frozen=True)
class RowView:
    """What to show of a row.

    Attributes:
        place: Where the row was read.
        prompt: The text of the tokens that are no targets, at least the first token; special tokens are visible.
        target: The text of the tokens that are.
        prompt_tokens: Their number.
        target_tokens: Their number, after the row was cut.
        cut_tokens: How many tokens ``dataset.max_seq_length`` leaves out at the end.
        end: How the row ends, in words.
    """

    place: Place
    prompt: str
    target: str
    prompt_tokens: int
    target_tokens: int
    cut_tokens: int
    end: str

    @classmethod
    def of(cls, row: Row, place: Place, tokenizer: Any, max_seq_length: int) -> RowView:
        """The view of ``row``, which is not cut yet."""
        tokens = row.tokens[:max_seq_length].tolist()
        masked = min(max(row.prompt_length, 1), len(tokens))
        # Together, for a tokenizer may write the first token of a text without the space before it.
        whole, prompt = tokenizer.decode(tokens), tokenizer.decode(tokens[:masked])
        target = whole[len(prompt) :] if whole.startswith(prompt) else tokenizer.decode(tokens[masked:])
        cut = len(row.tokens) - len(tokens)
        end = _cut(cut, len(tokens) - masked) if cut else _end(tokens[masked:], tokenizer)
        return cls(place, prompt, target, masked, len(tokens) - masked, cut, end)


def _cut(tokens: int, targets: int) -> str:
    dropped = "" if targets else "; no target is left, so the row is dropped"
    return f"dataset.max_seq_length cuts off the last {tokens} tokens{dropped}"


def _end(targets: list[int], tokenizer: Any) -> str:
    """How the row with these target tokens ends."""
    texts = [tokenizer.decode([token]) for token in targets[-END_WITHIN:]]
    stops = [place for place, token in enumerate(targets[-END_WITHIN:]) if token in tokenizer.eos_token_ids]
    last = f"last token {texts[-1]!r}"
    if not stops:
        names = " or ".join(repr(tokenizer.decode([token])) for token in sorted(tokenizer.eos_token_ids)[:3])
        return f"{last}; no token ends the answer ({names} would)"
    if stops[-1] == len(texts) - 1:
        return f"{last}, which ends the answer"
    return f"{last}, after {texts[stops[-1]]!r}, which ends the answer"


def visible(text: str) -> str:
    """``text`` with a mark at each line break, and without characters that change a terminal."""
    return "".join(_visible(character) for character in text)


def _visible(character: str) -> str:
    if character == "\n":
        return "⏎\n"
    return character if character.isprintable() else repr(character)[1:-1]


def shortened(text: str, most: int) -> str:
    """``text`` with its middle left out if it has more than ``most`` characters."""
    if len(text) <= most:
        return text
    head, tail = 2 * most // 3, most // 3
    return f"{text[:head]} [... {len(text) - head - tail:,} characters ...] {text[-tail:]}"
