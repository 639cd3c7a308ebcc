"""Chooses the tokens of one answer, on the last stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.sample_utils import make_logits_processors
from numpy.typing import NDArray

from macft.evaluation.chat import Sampling
from macft.generation.tasks import Options, Outcome


class TokenChoice:
    """The state of one answer's sampling: its random key, and the tokens that penalties look at.

    Each answer has a random key of its own, so that a sample depends on its seed and not on what else is generated. The
    draws are those of ``mlx_lm.generate`` after ``mx.random.seed``. ``earlier`` is that of an answer that begins alike.
    """

    def __init__(self, options: Options, tokenizer: Any, earlier: TokenChoice | None = None):
        self._options, self._key = options, options.key
        self._sample = options.sampling.sampler(tokenizer)
        self._processors = make_logits_processors(dict(options.logit_bias) or None, **options.penalties)
        self._tokens: list[int] = [] if earlier is None else earlier._tokens

    def note(self, tokens: Sequence[int], forget: int) -> None:
        """``tokens`` have been computed, after the last ``forget`` of those before were taken back."""
        if forget:
            del self._tokens[-forget:]
        self._tokens += tokens

    def choose(self, logits: mx.array) -> Outcome:
        """The next token, by its ``logits`` (1, vocabulary)."""
        if self._processors:
            history = mx.array(self._tokens)
            for processor in self._processors:
                logits = processor(history, logits)
        logprobs = logits - mx.logsumexp(logits, keepdims=True)
        sampled, self._key = _draw(self._options.sampling, self._sample, logprobs, self._key)
        token = int(np.asarray(sampled)[0])
        values = np.asarray(logprobs[0].astype(mx.float32))
        return Outcome(token, float(values[token]), _most_likely(values, self._options.top), self._key)


def after_another_draw(key: int, sampling: Sampling, tokenizer: Any) -> int:
    """What a draw leaves of the random key ``key``. mlx-lm draws a token more than it gives."""
    return _draw(sampling, sampling.sampler(tokenizer), mx.zeros((1, max(len(tokenizer), sampling.top_k + 1))), key)[1]


def _draw(
    sampling: Sampling, sample: Callable[[mx.array], mx.array], logprobs: mx.array, key: int
) -> tuple[mx.array, int]:
    if sampling.temp <= 0:
        return sample(logprobs), key
    mx.random.seed(key)
    sampled = sample(logprobs)
    mx.eval(sampled)
    high, low = np.asarray(mx.random.state[0]).tolist()  # type: ignore[index]
    return sampled, high << 32 | low


def _most_likely(logprobs: NDArray[np.float32], count: int) -> tuple[tuple[int, float], ...]:
    if count <= 0:
        return ()
    count = min(count, len(logprobs))
    best = np.argpartition(-logprobs, count - 1)[:count]
    best = best[np.argsort(-logprobs[best])]
    return tuple((int(token), float(logprobs[token])) for token in best)
