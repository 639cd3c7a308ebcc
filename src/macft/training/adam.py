"""Adam's new parameters from its new state, so that each of them can be computed in the memory of the old one.

MLX's optimizers compute both from the old state, which then has to exist until the end.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.optimizers as optim


def is_adam(optimizer: optim.Optimizer) -> bool:
    """Whether :func:`parameter_after` is for this one: Adam or AdamW, and nothing derived from them."""
    return type(optimizer) in (optim.Adam, optim.AdamW)


def parameter_after(optimizer: Any, parameter: mx.array, m: mx.array, v: mx.array) -> mx.array:
    """What ``optimizer.apply_single`` of MLX (0.32) returns where it has made ``m`` and ``v``; all of one shape.

    ``optimizer.state`` has the learning rate, and the step that ``m`` and ``v`` are of.
    """
    rate = optimizer.learning_rate.astype(parameter.dtype)
    if isinstance(optimizer, optim.AdamW):
        parameter = parameter * (1 - rate * optimizer.weight_decay)
    if optimizer.bias_correction:
        first, second = optimizer.betas
        m = (rate / (1 - first**optimizer.step)).astype(parameter.dtype) * m
        root = mx.sqrt(v) * mx.rsqrt(1 - second**optimizer.step).astype(parameter.dtype)
    else:
        m, root = rate * m, mx.sqrt(v)
    after: mx.array = parameter - m / (root + optimizer.eps)
    return after
