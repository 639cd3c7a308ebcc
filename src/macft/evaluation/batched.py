"""Greedy answers to many prompts, as many at once as the model's architecture gets right."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.generate import batch_generate, stream_generate

Prompt = Sequence[int]
"""Tokens."""

_TOGETHER = 32
# Prompts that mlx-lm begins at the same time; more of them would be at different lengths again.
_ALIKE = 8
_TRIAL_TOKENS = 3


def greedy_answers(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int,
    progress: Callable[[int], None],
    stopped: Callable[[], bool] = lambda: False,
) -> list[list[int]]:
    """The most likely answer to each of ``prompts``, of at most ``max_tokens`` tokens, without the one that ends it.

    mlx-lm pads prompts of different lengths in a batch. Not every architecture copes: some attend to the padding or
    keep it in their state, and some can't compute a batch at all. So three prompts are tried first. Prompts of
    all lengths are generated together if the answers are then as likely as alone, else prompts of one length, else
    one after the other. ``progress`` is called with the number of finished answers. Once ``stopped()``, which is asked
    between two batches, the answers that are missing are empty.
    """
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))  # which needs little padding
    model.eval()
    answers: list[list[int]] = [[] for _ in prompts]
    done = 0
    for group in _groups(model, tokenizer, prompts, order):
        if stopped():
            break
        if len(group) == 1:
            answers[group[0]] = [token for token, _ in _alone(model, tokenizer, prompts[group[0]], max_tokens)]
        else:
            inputs = [list(prompts[index]) for index in group]
            found = batch_generate(model, tokenizer, inputs, max_tokens=max_tokens, return_token_ids=True)
            for index, tokens in zip(group, found.token_ids, strict=True):
                answers[index] = tokens
        done += len(group)
        progress(done)
    return answers


def _groups(model: nn.Module, tokenizer: Any, prompts: Sequence[Prompt], order: Sequence[int]) -> Iterator[list[int]]:
    """The indices in ``order``, in groups to be generated together."""
    if len(order) < 2:
        yield from ([index] for index in order)
        return
    shortest, longest = prompts[order[0]], prompts[order[-1]]
    # Three, since two rows may pass for the two groups of heads that a mask is spread over; one with padding of a
    # single token, which no block of a sparse attention is a multiple of.
    if takes_batches(model, tokenizer, [shortest, longest, longest[1:] or shortest]):
        yield from _chunks(order, _TOGETHER)
    elif takes_batches(model, tokenizer, [shortest, longest[-len(shortest) :], shortest]):
        for _, alike in groupby(order, key=lambda index: len(prompts[index])):
            yield from _chunks(list(alike), _ALIKE)
    else:
        yield from ([index] for index in order)


def _chunks(indices: Sequence[int], size: int) -> Iterator[list[int]]:
    return (list(indices[start : start + size]) for start in range(0, len(indices), size))


def takes_batches(model: nn.Module, tokenizer: Any, prompts: Sequence[Prompt]) -> bool:
    """Whether the first tokens of the answers to ``prompts`` have the same probabilities in a batch as alone."""
    try:
        batch = batch_generate(
            model,
            tokenizer,
            [list(prompt) for prompt in prompts],
            max_tokens=_TRIAL_TOKENS,
            return_token_ids=True,
            return_logprobs=True,
        )
    except Exception:  # the model's own code, which was not made for this
        return False
    is_float32 = all(value.dtype == mx.float32 for _, value in tree_flatten(model.parameters()))
    # In other types the rounding of a logit alone is 0.1.
    tolerance = 0.01 if is_float32 else 0.25
    for prompt, tokens, found in zip(prompts, batch.token_ids, batch.logprobs, strict=True):
        steps = _alone(model, tokenizer, prompt, _TRIAL_TOKENS)
        for token, logprob, (best, logprobs) in zip(tokens, found, steps, strict=False):
            expected = float(np.asarray(logprobs[token]))
            if abs(expected - logprob) > tolerance or float(np.asarray(logprobs[best])) - expected > tolerance:
                return False
            if token != best:  # two were as likely, and what follows differs
                break
    return True


def _alone(model: nn.Module, tokenizer: Any, prompt: Prompt, max_tokens: int) -> Iterator[tuple[int, mx.array]]:
    """The tokens of the answer, each with the log-probabilities (vocabulary,) it was taken from."""
    for part in stream_generate(model, tokenizer, mx.array(list(prompt)), max_tokens=max_tokens):
        if part.token not in tokenizer.eos_token_ids:
            yield int(part.token), part.logprobs
