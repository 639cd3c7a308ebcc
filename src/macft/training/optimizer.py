"""The optimizer update: learning rate of a step, clipping by the global norm, an MLX optimizer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from macft.device.mlx_device import start
from macft.errors import ConfigError
from macft.model.parameter_refs import ParameterRefs
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

_ELEMENT_BY_ELEMENT = (optim.Adam, optim.Adamax, optim.Lion, optim.SGD, optim.RMSprop, optim.Adagrad)
"""Optimizers that know nothing of a parameter's shape; AdamW is an Adam here."""
_LARGE = 1 << 18


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


class OptimizerStep:
    """The update of ``model``'s trainable parameters, one call a step.

    Where the optimizer treats each element by itself, small parameters are updated as one long array: the same result
    from a hundredth of the operations. The optimizer's state is then that of the long array.
    """

    def __init__(self, model: nn.Module, optimizer: optim.Optimizer, *, compiled: bool = False):
        self._parameters, self._optimizer = ParameterRefs(model), optimizer
        self._step = mx.compile(self._updated) if compiled else self._updated
        self._step_if_finite = mx.compile(self._updated_if_finite) if compiled else self._updated_if_finite
        self._is_sound = mx.array(True)

    def __call__(self, gradient: Mapping[str, Any], rate: float, factor: float = 1.0) -> None:
        """One update by ``factor`` times ``gradient``, which maps the parameters' names to float32 arrays."""
        parameters, state = self._before(rate)
        ours = {name: gradient[name] for name in parameters}
        updated, self._optimizer.state = self._step(parameters, ours, state, mx.array(factor))
        self._parameters.put(updated[name] for name in self._parameters.names)
        del parameters, ours, state  # MLX may compute in the memory of the old ones
        mx.eval(updated, self._optimizer.state)

    def queue(
        self, gradient: Mapping[str, Any], rate: float, loss_sum: Any, target_tokens: int, max_norm: float
    ) -> tuple[Any, Any]:
        """An update that nobody waits for, by the mean of summed ``gradient``, clipped to ``max_norm`` (0: not at all).

        Returns the mean loss and the L2 norm of its gradient, float32 (), on their way as the update is. Where one of
        them isn't finite, the parameters stay as they are, from then on.
        """
        parameters, state = self._before(rate)
        ours = {name: gradient[name] for name in parameters}
        factor = mx.array(1.0 / max(target_tokens, 1))
        updated, self._optimizer.state, loss, norm, self._is_sound = self._step_if_finite(
            parameters, ours, state, loss_sum, factor, self._is_sound, max_norm
        )
        self._parameters.put(updated[name] for name in self._parameters.names)
        del parameters, ours, state  # MLX may compute in the memory of the old ones
        arrays = [loss, norm, self._is_sound, *updated.values()]
        arrays += [value for _, value in tree_flatten(self._optimizer.state)]
        start(arrays)
        return loss, norm

    def _before(self, rate: float) -> tuple[dict[str, Any], dict[str, Any]]:
        self._optimizer.learning_rate = rate
        return dict(zip(self._parameters.names, self._parameters.get(), strict=True)), self._optimizer.state

    def _updated_if_finite(
        self,
        parameters: dict[str, Any],
        gradient: dict[str, Any],
        state: dict[str, Any],
        loss_sum: Any,
        factor: Any,
        is_sound: Any,
        max_norm: float,
    ) -> tuple[dict[str, Any], dict[str, Any], Any, Any, Any]:
        loss = loss_sum * factor
        squares = [mx.square(value).sum() for value in gradient.values()]
        norm = factor * mx.sqrt(sum(squares, mx.array(0.0)))
        is_sound = is_sound & mx.isfinite(loss) & mx.isfinite(norm)
        clip = mx.where(norm > max_norm, max_norm / norm, 1.0) if max_norm else mx.array(1.0)
        updated, state = self._updated(parameters, gradient, state, factor * clip)
        kept = {name: mx.where(is_sound, value, parameters[name]) for name, value in updated.items()}
        return kept, state, loss, norm, is_sound

    def _updated(
        self, parameters: dict[str, Any], gradient: dict[str, Any], state: dict[str, Any], factor: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The parameters and the optimizer's state after an update."""
        optimizer = self._optimizer
        by_element = isinstance(optimizer, _ELEMENT_BY_ELEMENT)
        groups = _groups(parameters) if by_element else {name: [name] for name in parameters}
        optimizer.state = state
        scaled = [
            (key, (_joined(gradient, names) * factor).astype(parameters[names[0]].dtype))
            for key, names in groups.items()
        ]
        before = [(key, _joined(parameters, names)) for key, names in groups.items()]
        updated: dict[str, Any] = dict(
            tree_flatten(optimizer.apply_gradients(tree_unflatten(scaled), tree_unflatten(before)))
        )
        for key, names in groups.items():
            if names != [key]:
                ends = np.cumsum([parameters[name].size for name in names])[:-1].tolist()
                for name, part in zip(names, mx.split(updated.pop(key), ends), strict=True):
                    updated[name] = part.reshape(parameters[name].shape)
        return updated, optimizer.state


def _groups(parameters: Mapping[str, Any]) -> dict[str, list[str]]:
    """Names of parameters to update together, by a name for the whole; a large one is left by itself."""
    groups: dict[str, list[str]] = {}
    for name, parameter in parameters.items():
        kind = str(parameter.dtype).removeprefix("mlx.core.")
        groups.setdefault(name if parameter.size >= _LARGE else f"small-{kind}", []).append(name)
    return groups


def _joined(arrays: Mapping[str, Any], names: list[str]) -> Any:
    return arrays[names[0]] if len(names) == 1 else mx.concatenate([arrays[name].reshape(-1) for name in names])
