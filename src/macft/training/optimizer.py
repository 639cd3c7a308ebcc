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
from macft.training.clipping import clip_by_global_norm
from macft.training.optimizer_table import OPTIMIZERS
from macft.training.settings import OptimizerConfig

_BY_ELEMENT = {info.mlx_class for info in OPTIMIZERS.values() if info.by_element}
_LARGE = 1 << 18


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """The learning rate of update ``step`` (from 0), a pure function, so that a resumed run follows the same curve.

    Warm-up is linear, from above 0 at step 0 to the peak at step ``warmup_steps``. The last step, ``total_steps - 1``,
    has exactly ``final_learning_rate``, unless it is the one with the peak.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return config.learning_rate
    done = (step - config.warmup_steps) / max(1, total_steps - 1 - config.warmup_steps)
    left = (1 + math.cos(math.pi * min(done, 1.0))) / 2 if config.schedule == "cosine" else 1 - min(done, 1.0)
    return config.final_learning_rate + (config.learning_rate - config.final_learning_rate) * left


def make_optimizer(config: OptimizerConfig) -> optim.Optimizer:
    """An MLX optimizer; the caller sets its learning rate before each update.

    Raises:
        ConfigError: ``optimizer.arguments`` names an argument this optimizer doesn't take.
    """
    info = OPTIMIZERS[config.name]
    arguments: dict[str, Any] = dict(info.defaults) | dict(config.arguments)
    if info.weight_decay:
        arguments["weight_decay"] = config.weight_decay
    try:
        optimizer: optim.Optimizer = getattr(optim, info.mlx_class)(learning_rate=config.learning_rate, **arguments)
        return optimizer
    except TypeError as error:
        raise ConfigError(f"optimizer.arguments: {config.name} takes no such argument ({error})") from error


OptimizerState = dict[str, Any]
"""A tree of arrays, as MLX's optimizers keep it."""


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

    def __call__(self, gradient: Mapping[str, mx.array], rate: float, scale: float = 1.0) -> None:
        """One update by ``scale`` times ``gradient``, which maps the parameters' names to float32 arrays."""
        parameters, state = self._before(rate)
        gradient = {name: gradient[name] for name in parameters}
        updated, self._optimizer.state = self._step(parameters, gradient, state, mx.array(scale))
        self._parameters.put(updated[name] for name in self._parameters.names)
        del parameters, gradient, state  # MLX may compute in the memory of the old ones
        mx.eval(updated, self._optimizer.state)

    def queue(
        self, gradient: Mapping[str, mx.array], rate: float, loss_sum: mx.array, target_tokens: int, max_norm: float
    ) -> tuple[mx.array, mx.array]:
        """The same for a summed ``gradient`` whose norm is not known yet; nobody waits for it.

        Returns the mean loss and the L2 norm of its gradient, float32 (), still being computed. Where one of them is
        not finite, the parameters stay as they are, from then on.
        """
        parameters, state = self._before(rate)
        gradient = {name: gradient[name] for name in parameters}
        count = mx.array(float(target_tokens))
        updated, self._optimizer.state, loss, norm, self._is_sound = self._step_if_finite(
            parameters, gradient, state, loss_sum, count, self._is_sound, max_norm
        )
        self._parameters.put(updated[name] for name in self._parameters.names)
        del parameters, gradient, state  # MLX may compute in the memory of the old ones
        arrays = [loss, norm, self._is_sound, *updated.values()]
        arrays += [value for _, value in tree_flatten(self._optimizer.state)]
        start(arrays)
        return loss, norm

    def _before(self, rate: float) -> tuple[dict[str, mx.array], OptimizerState]:
        self._optimizer.learning_rate = rate
        return dict(zip(self._parameters.names, self._parameters.get(), strict=True)), self._optimizer.state

    def _updated_if_finite(
        self,
        parameters: dict[str, mx.array],
        gradient: dict[str, mx.array],
        state: OptimizerState,
        loss_sum: mx.array,
        target_tokens: mx.array,
        is_sound: mx.array,
        max_norm: float,
    ) -> tuple[dict[str, mx.array], OptimizerState, mx.array, mx.array, mx.array]:
        squares = [mx.square(value).sum() for value in gradient.values()]
        norm_of_sum = mx.sqrt(sum(squares, mx.array(0.0)))
        loss, norm, scale, is_finite = clip_by_global_norm(loss_sum, norm_of_sum, target_tokens, max_norm, xp=mx)
        is_sound = is_sound & is_finite
        updated, state = self._updated(parameters, gradient, state, scale)
        kept = {name: mx.where(is_sound, value, parameters[name]) for name, value in updated.items()}
        return kept, state, loss, norm, is_sound

    def _updated(
        self,
        parameters: dict[str, mx.array],
        gradient: dict[str, mx.array],
        state: OptimizerState,
        scale: mx.array,
    ) -> tuple[dict[str, mx.array], OptimizerState]:
        """The parameters and the optimizer's state after an update."""
        optimizer = self._optimizer
        groups = (
            _groups(parameters) if type(optimizer).__name__ in _BY_ELEMENT else {name: [name] for name in parameters}
        )
        optimizer.state = state
        scaled = [
            (key, (_joined(gradient, names) * scale).astype(parameters[names[0]].dtype))
            for key, names in groups.items()
        ]
        before = [(key, _joined(parameters, names)) for key, names in groups.items()]
        updated: dict[str, mx.array] = dict(
            tree_flatten(optimizer.apply_gradients(tree_unflatten(scaled), tree_unflatten(before)))
        )
        for key, names in groups.items():
            if names != [key]:
                ends = np.cumsum([parameters[name].size for name in names])[:-1].tolist()
                for name, part in zip(names, mx.split(updated.pop(key), ends), strict=True):
                    updated[name] = part.reshape(parameters[name].shape)
        return updated, optimizer.state


def _groups(parameters: Mapping[str, mx.array]) -> dict[str, list[str]]:
    """Names of parameters to update together, by a name for the whole; a large one is left by itself."""
    groups: dict[str, list[str]] = {}
    for name, parameter in parameters.items():
        kind = str(parameter.dtype).removeprefix("mlx.core.")
        groups.setdefault(name if parameter.size >= _LARGE else f"small-{kind}", []).append(name)
    return groups


def _joined(arrays: Mapping[str, mx.array], names: list[str]) -> mx.array:
    return arrays[names[0]] if len(names) == 1 else mx.concatenate([arrays[name].reshape(-1) for name in names])
