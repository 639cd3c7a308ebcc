"""Whether a model's code can be compiled, shown by a trial."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn


class _Traced(Exception):
    """Ends a trace, so that nothing of it is compiled."""


def can_trace(function: Callable[[mx.array], object], tokens: mx.array) -> bool:
    """Whether ``mx.compile`` can follow ``function(tokens)``; nothing is computed, and nothing compiled."""

    def follow(tokens: mx.array) -> None:
        function(tokens)
        raise _Traced

    try:
        mx.compile(follow)(tokens)
    except _Traced:
        return True
    except Exception:  # the code of an architecture may raise anything
        return False
    raise AssertionError("a trace ends with an exception")


def is_traceable(model: nn.Module) -> bool:
    """Whether ``mx.compile`` can follow a training step of ``model``; not where its code needs values of arrays."""
    was_training = model.training
    model.train()
    try:
        return can_trace(model, mx.zeros((1, 8), mx.int32))
    finally:
        model.train(was_training)
