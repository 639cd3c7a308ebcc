"""Cross-entropy in chunks of target positions, so that logits (N, V) never exist as a whole.

The head is frozen in LoRA, so all the backward pass needs is the gradient of the hidden states. It is computed with the
loss, chunk by chunk, while a chunk's logits exist (as in Liger Kernel, Hsu et al. 2024, and in the spirit of Cut
Cross-Entropy, Wijmans et al. 2024). Exact: nothing is sampled, filtered or rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import mlx.core as mx
import mlx.nn as nn

from macft.model.backends.operation import operation

Exponentials = Callable[[mx.array, mx.array], tuple[mx.array, mx.array]]
"""Logits (n, V) float32 and their maxima (n, 1) to exp(logits - maxima) (n, V) and the sums of those (n, 1)."""
LossAndGradient = Callable[[mx.array, mx.array, mx.array], tuple[mx.array, mx.array]]
"""Logits (n, V), targets and weights (n,) to the summed loss, float32, and the gradient of each position's loss without
its weight, in the logits' type."""


def whole_cross_entropy(logits: mx.array, targets: mx.array, weights: mx.array) -> mx.array:
    """``sum(weights * cross_entropy(logits, targets))``, float32, of ``logits`` (N, V)."""
    losses: mx.array = nn.losses.cross_entropy(logits.astype(mx.float32), targets)
    return (losses * weights).sum()


def loss_in_chunks(
    head: Callable[[mx.array], mx.array], hidden: mx.array, targets: mx.array, weights: mx.array, *, chunk: int
) -> mx.array:
    """The same of ``head(hidden)``, without a gradient: the logits of ``chunk`` of the positions exist at once."""
    loss = mx.zeros(())
    for start in range(0, hidden.shape[0], chunk):
        end = start + chunk
        part = mx.depends([hidden[start:end]], [loss])[0]
        loss = loss + whole_cross_entropy(logits_of(head, part), targets[start:end], weights[start:end])
    return loss


def lean_loss_and_gradient(logits: mx.array, targets: mx.array, weights: mx.array) -> tuple[mx.array, mx.array]:
    """See ``LossAndGradient``. The logits exist in float32 only for their sum, and their softmax in their own type."""
    words = targets[:, None]
    totals = mx.logsumexp(logits.astype(mx.float32), axis=-1, keepdims=True)
    log_shares = mx.take_along_axis(logits, words, axis=-1).astype(mx.float32) - totals
    loss = -(log_shares[:, 0] * weights).sum()
    # After the loss, so that the float32 logits are gone.
    shares = mx.softmax(mx.depends([logits], [loss])[0], axis=-1, precise=True)
    return loss, mx.put_along_axis(shares, words, (mx.exp(log_shares) - 1).astype(logits.dtype), axis=-1)


def logits_of(head: Callable[[mx.array], mx.array], hidden: mx.array) -> mx.array:
    """(n, V) of ``hidden`` (n, D). Not by an index, which would copy them, and the gradient with them."""
    return head(hidden[None]).squeeze(0)


def loss_and_gradient_of(exponentials: Exponentials) -> LossAndGradient:
    """The same by another function for exponentials."""
    return partial(_loss_and_gradient, exponentials)


def chunked_cross_entropy(
    head: Callable[[mx.array], mx.array],
    hidden: mx.array,
    targets: mx.array,
    weights: mx.array,
    *,
    chunk: int,
    loss_and_gradient: LossAndGradient = lean_loss_and_gradient,
    detached: Callable[[mx.array], mx.array] = lambda value: value,
) -> mx.array:
    """``sum(weights * cross_entropy(head(hidden), targets))``, float32.

    ``hidden`` (N, D), ``targets`` (N,) int32, ``weights`` (N,) float32; ``chunk`` of the positions at once. The
    gradient reaches ``hidden`` only: ``head`` must hold no trainable parameter. ``detached`` is called with each part
    of the result, for backends that compute it here and now and would otherwise hold all that led to it.
    """

    def forward(hidden: mx.array) -> tuple[mx.array, mx.array]:
        hidden = detached(hidden)
        value = loss = mx.zeros(())
        grad_parts: list[mx.array] = []
        for start in range(0, hidden.shape[0], chunk):
            part = hidden[start : start + chunk]
            if grad_parts:  # one chunk after the other, its loss included, so that only one's logits exist
                part = mx.depends([part], [grad_parts[-1], value])[0]
            end = start + chunk
            logits = logits_of(head, part)
            value, grad_logits = loss_and_gradient(logits, targets[start:end], weights[start:end])
            grad = mx.vjp(lambda part: logits_of(head, part), [part], [grad_logits])[1][0]
            # A position's weight is the same for all words, so that it can be left to the smaller array.
            grad_parts.append(detached((grad * weights[start:end, None]).astype(grad.dtype)))
            value = detached(value)
            loss = loss + value
        return loss, mx.concatenate(grad_parts, axis=0)

    def grad_hidden(
        _inputs: Sequence[mx.array], cotangents: tuple[mx.array, mx.array], output: tuple[mx.array, mx.array]
    ) -> list[mx.array]:
        return [cotangents[0].astype(output[1].dtype) * output[1]]

    return operation(forward, grad_hidden)(hidden)[0]


def _loss_and_gradient(
    exponentials: Exponentials, logits: mx.array, targets: mx.array, weights: mx.array
) -> tuple[mx.array, mx.array]:
    dtype, logits = logits.dtype, logits.astype(mx.float32)
    maxima = logits.max(axis=-1, keepdims=True)
    powers, total = exponentials(logits, maxima)
    right = mx.take_along_axis(logits, targets[:, None], axis=-1) - maxima
    loss = ((mx.log(total) - right)[:, 0] * weights).sum()
    gradient = powers / total
    at_target = mx.take_along_axis(gradient, targets[:, None], axis=-1) - 1
    return loss, mx.put_along_axis(gradient, targets[:, None], at_target, axis=-1).astype(dtype)
