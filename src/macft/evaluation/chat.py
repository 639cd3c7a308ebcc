"""A conversation with a model, answered token by token."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import stream_generate
from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache
from mlx_lm.sample_utils import make_sampler

from macft.data.conversation import Conversation
from macft.data.template import template_tokens
from macft.data.tokenize import text_tokens
from macft.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """How the next token is sampled: the options of ``mlx_lm.generate``, with its names and defaults."""

    max_tokens: int = 256
    temp: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0
    top_k: int = 0
    min_tokens_to_keep: int = 1
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    max_kv_size: int | None = None

    def problems(self) -> list[str]:
        """One line for each invalid value."""
        errors = []
        if self.max_tokens < 1 and self.max_tokens != -1:
            errors.append(f"--max-tokens: {self.max_tokens} must be 1 or more, or -1 for no limit")
        if not self.temp >= 0.0:
            errors.append(f"--temp: {self.temp} must be 0 (always the most likely token) or more")
        for name in ("top_p", "min_p", "xtc_probability"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                errors.append(f"--{name.replace('_', '-')}: {getattr(self, name)} is not in [0, 1]")
        if not 0.0 <= self.xtc_threshold <= 0.5:
            errors.append(f"--xtc-threshold: {self.xtc_threshold} is not in [0, 0.5]")
        if self.top_k < 0:
            errors.append(f"--top-k: {self.top_k} must be 0 (off) or more")
        if self.min_tokens_to_keep < 1:
            errors.append(f"--min-tokens-to-keep: {self.min_tokens_to_keep} must be 1 or more")
        if self.max_kv_size is not None and self.max_kv_size < 16:
            errors.append(f"--max-kv-size: {self.max_kv_size} must be 16 or more")
        return errors

    def sampler(self, tokenizer: Any) -> Callable[[mx.array], mx.array]:
        """mlx-lm's sampler for these options: log-probabilities (batch, vocabulary) to tokens (batch,)."""
        return make_sampler(  # type: ignore[no-any-return]
            self.temp,
            self.top_p,
            self.min_p,
            self.min_tokens_to_keep,
            top_k=self.top_k if self.top_k < len(tokenizer) else 0,
            xtc_probability=self.xtc_probability,
            xtc_threshold=self.xtc_threshold,
            xtc_special_tokens=tokenizer.encode("\n") + list(tokenizer.eos_token_ids),
        )


def add_stop_tokens(tokenizer: Any, tokens: Sequence[str]) -> None:
    """Lets ``tokens``, by their text or number, end an answer; raises ConfigError if the model has no such token."""
    for token in tokens:
        number = None if token.isdecimal() else tokenizer.convert_tokens_to_ids(token)
        # Of a text that is no token some tokenizers make none, others their token for what is unknown.
        if not token.isdecimal() and (number is None or tokenizer.convert_ids_to_tokens(number) != token):
            raise ConfigError(
                f"--extra-eos-token: {token!r} is no token of this model; give one such as {tokenizer.eos_token!r}, or "
                "its number"
            )
        tokenizer.add_eos_token(token)


def seed_problems(seed: int | None) -> list[str]:
    """A line where ``seed`` is none that MLX takes."""
    return [] if seed is None or 0 <= seed < 2**64 else [f"--seed: {seed} must be from 0 to 2**64 - 1"]


@dataclass(frozen=True)
class Speed:
    """Number of tokens of the last prompt and answer, and their rates in tokens per second."""

    prompt_tokens: int
    prompt_rate: float
    answer_tokens: int
    answer_rate: float


class AnswerSource(Protocol):
    """What computes the answers of a conversation."""

    speed: Speed | None
    """Of the last answer."""

    def stream(self, prompt: list[int]) -> Generator[str]:
        """Yields the answer to ``prompt``, tokens, in pieces. The generator may be closed at any point."""
        ...

    def reset(self) -> None:
        """The next prompt begins a new conversation."""
        ...


class ModelAnswers:
    """The answers of ``model``, in this process. Its key-value cache is kept from one prompt to the next."""

    def __init__(self, model: nn.Module, tokenizer: Any, sampling: Sampling):
        self._model, self._tokenizer, self._sampling = model, tokenizer, sampling
        self._sampler = sampling.sampler(tokenizer)
        self.speed: Speed | None = None
        self.reset()

    def reset(self) -> None:
        """See :class:`AnswerSource`."""
        self._cache = make_prompt_cache(self._model, self._sampling.max_kv_size)
        self._cached_tokens: list[int] = []

    def stream(self, prompt: list[int]) -> Generator[str]:
        """See :class:`AnswerSource`."""
        generated = []
        try:
            for part in stream_generate(
                self._model,
                self._tokenizer,
                mx.array(self._not_in_cache(prompt)),
                max_tokens=self._sampling.max_tokens,
                sampler=self._sampler,
                prompt_cache=self._cache,
            ):
                generated.append(int(part.token))
                self.speed = Speed(part.prompt_tokens, part.prompt_tps, part.generation_tokens, part.generation_tps)
                yield part.text
        finally:
            # The newest token may or may not be in the cache yet: the cache's own offset says how many are.
            tokens = prompt + generated
            offset = getattr(self._cache[0], "offset", len(tokens) + 1)
            if offset <= len(tokens) and can_trim_prompt_cache(self._cache):
                self._cached_tokens = tokens[:offset]
            else:
                self.reset()

    def _not_in_cache(self, prompt: list[int]) -> list[int]:
        """The end of ``prompt`` that is not in the cache, at least its last token; trims the cache to the rest."""
        same = 0
        for old, new in zip(self._cached_tokens, prompt[:-1], strict=False):
            if old != new:
                break
            same += 1
        if same < len(self._cached_tokens):
            if can_trim_prompt_cache(self._cache):
                trim_prompt_cache(self._cache, len(self._cached_tokens) - same)
            else:
                self.reset()
                return prompt
        return prompt[same:]


class Chat:
    """A conversation, which keeps its messages.

    Args:
        source: Computes the answers.
        tokenizer: The model's.
        system_prompt: The first message, with the role system.
        template: Whether to apply the model's chat template. Without it the model gets the plain text, for models that
            were tuned on text rows.
    """

    def __init__(
        self, source: AnswerSource, tokenizer: Any, *, system_prompt: str | None = None, template: bool = True
    ):
        self._source, self._tokenizer = source, tokenizer
        self._template = template and tokenizer.has_chat_template
        self._system = [{"role": "system", "content": system_prompt}] if system_prompt else []
        self.reset()

    @property
    def speed(self) -> Speed | None:
        """Of the last answer."""
        return self._source.speed

    def reset(self) -> None:
        """Starts a new conversation."""
        self._messages = list(self._system)
        self._text = ""
        self._source.reset()

    def say(self, text: str) -> Generator[str]:
        """Yields the answer to ``text`` in pieces. The generator may be closed at any point: the answer so far is kept.

        Raises:
            DataError: The model's chat template refuses the conversation.
        """
        parts = self._source.stream(self._tokens_with(text))
        answer = ""
        try:
            for part in parts:
                answer += part
                yield part
        finally:
            parts.close()
            self._messages.append({"role": "assistant", "content": answer})
            self._text += answer

    def _tokens_with(self, text: str) -> list[int]:
        if not self._template:
            self._text += text
            return text_tokens(self._text, self._tokenizer)
        messages = [*self._messages, {"role": "user", "content": text}]
        tokens = template_tokens(Conversation(messages), self._tokenizer, opens_answer=True)
        self._messages = messages
        return tokens
