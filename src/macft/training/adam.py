"""Adam's parameters from its new state, so that parameters and state are each computed in the memory of the old ones.

MLX's optimizers make both at once, and their kernels read old state and parameters: nothing can take the memory of
anything, and an update takes three times the parameters beside what there is.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.optimizers as optim

_KINDS = (optim.Adam, optim.AdamW)


def has_new_parameters(optimizer: optim.Optimizer) -> bool:
    """Whether :func:`new_parameter` is for this one, and for none that is derived from it."""
    return type(optimizer) in _KINDS


def new_parameter(optimizer: Any, parameter: mx.array, m: mx.array, v: mx.array) -> mx.array:
    """What ``optimizer.apply_single`` of MLX (0.32) returns where it has made ``m`` and ``v``, of that shape.

    The optimizer's state holds the step, already counted, and the learning rate.
    """
    rate: mx.array = optimizer.learning_rate.astype(parameter.dtype)
    if isinstance(optimizer, optim.AdamW):
        parameter = parameter * (1 - rate * optimizer.weight_decay)
    rate_of_mean, root = rate, mx.sqrt(v)
    if optimizer.bias_correction:
        first, second = optimizer.betas
        rate_of_mean = (rate / (1 - first**optimizer.step)).astype(parameter.dtype)
        root = root * mx.rsqrt(1 - second**optimizer.step).astype(parameter.dtype)
    updated: mx.array = parameter - rate_of_mean * m / (root + optimizer.eps)
    return updated
