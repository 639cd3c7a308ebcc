"""Whether a model's code can be compiled, shown by a trial."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn


class _Traced(Exception):
    """Ends a trace, so that nothing of it is compiled."""


def is_traceable(model: nn.Module) -> bool:
    """Whether ``mx.compile`` can follow a training step of ``model``; not where its code needs values of arrays."""

    def follow(tokens: mx.array) -> None:
        model(tokens)
        raise _Traced

    was_training = model.training
    model.train()
    try:
        mx.compile(follow)(mx.zeros((1, 8), mx.int32))
    except _Traced:
        return True
    except Exception:  # the code of an architecture may raise anything
        return False
    finally:
        model.train(was_training)
    raise AssertionError("a trace ends with an exception")
