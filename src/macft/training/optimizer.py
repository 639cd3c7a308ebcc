"""The optimizer update: learning rate of a step, clipping by the global norm, an MLX optimizer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten

from macft.errors import ConfigError
from macft.training.settings import OptimizerConfig

_CLASSES = {
    "adamw": optim.AdamW,
    "adam": optim.Adam,
    "adamax": optim.Adamax,
    "lion": optim.Lion,
    "muon": optim.Muon,
    "sgd": optim.SGD,
    "adafactor": optim.Adafactor,
    "rmsprop": optim.RMSprop,
    "adagrad": optim.Adagrad,
}


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """The learning rate of update ``step`` (from 0), a pure function, so that a resumed run follows the same curve.

    Warm-up is linear and reaches the peak at step ``warmup_steps``.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return config.learning_rate
    done = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    left = (1 + math.cos(math.pi * min(done, 1.0))) / 2 if config.schedule == "cosine" else 1 - min(done, 1.0)
    return config.final_learning_rate + (config.learning_rate - config.final_learning_rate) * left


def make_optimizer(config: OptimizerConfig) -> optim.Optimizer:
    """An MLX optimizer; the caller sets its learning rate before each update.

    Raises:
        ConfigError: ``optimizer.arguments`` names an argument this optimizer doesn't take.
    """
    arguments: dict[str, Any] = dict(config.arguments)
    if config.name in ("adamw", "lion", "muon", "sgd", "adafactor"):
        arguments["weight_decay"] = config.weight_decay
    if config.name in ("adam", "adamw"):
        # The papers' bias correction, which MLX leaves off by default: without it the first steps are far too long.
        arguments.setdefault("bias_correction", True)
    if config.name == "adafactor":
        # The learning rate comes from the schedule, as for the others.
        arguments = {"relative_step": False, "scale_parameter": False} | arguments
    try:
        return _CLASSES[config.name](learning_rate=config.learning_rate, **arguments)
    except TypeError as error:
        raise ConfigError(f"optimizer.arguments: {config.name} takes no such argument ({error})") from error


def clip_factor(norm: float, max_norm: float) -> float:
    """What to multiply a gradient of L2 norm ``norm`` with so that it is at most ``max_norm``; 0 means no limit."""
    return max_norm / norm if max_norm and norm > max_norm else 1.0


def apply_gradient(model: nn.Module, optimizer: optim.Optimizer, gradient: Mapping[str, Any], rate: float) -> None:
    """One update of ``model``'s trainable parameters; ``gradient`` maps their names to float32 arrays."""
    parameters = dict(tree_flatten(model.trainable_parameters()))
    typed = [(name, gradient[name].astype(parameter.dtype)) for name, parameter in parameters.items()]
    optimizer.learning_rate = rate
    optimizer.update(model, tree_unflatten(typed))
    mx.eval(model.trainable_parameters(), optimizer.state)
