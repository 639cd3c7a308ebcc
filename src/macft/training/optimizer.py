"""The optimizer update: learning rate of a step, clipping by the global norm, an MLX optimizer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten

from macft.device.mlx_device import start
from macft.errors import ConfigError
from macft.model.joined_parameters import Joined, JoinedParameters
from macft.training.clipping import clip_by_global_norm
from macft.training.optimizer_table import OPTIMIZERS
from macft.training.settings import OptimizerConfig

_BY_ELEMENT = {info.mlx_class for info in OPTIMIZERS.values() if info.by_element}


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
        self._parameters, self._optimizer = JoinedParameters.of(model), optimizer
        self._step = mx.compile(self._updated_by_name) if compiled else self._updated_by_name
        self._step_if_finite = mx.compile(self._updated_if_finite) if compiled else self._updated_if_finite
        self._is_sound = mx.array(True)

    def __call__(self, gradient: Mapping[str, mx.array], rate: float, scale: float = 1.0) -> None:
        """One update by ``scale`` times ``gradient``, float32 arrays by the parameters' names.

        Some may be joined, under the name of the first, as for :meth:`JoinedParameters.join`.
        """
        parameters, state = self._before(rate)
        updated, self._optimizer.state = self._step(parameters, dict(gradient), state, mx.array(scale))
        views = self._parameters.put(updated)
        del parameters, gradient, state  # MLX may compute in the memory of the old ones
        mx.eval(updated, views, self._optimizer.state)

    def queue(
        self, gradient: Joined, rate: float, loss_sum: mx.array, target_tokens: int, max_norm: float
    ) -> tuple[mx.array, mx.array]:
        """The same for a summed ``gradient`` whose norm is not known yet; nobody waits for it.

        ``gradient`` is joined as the parameters are. Returns the mean loss and the L2 norm of its gradient, float32 (),
        still being computed. Where one of them is not finite, the parameters stay as they are, from then on.
        """
        parameters, state = self._before(rate)
        count = mx.array(float(target_tokens))
        updated, self._optimizer.state, loss, norm, self._is_sound = self._step_if_finite(
            parameters, dict(gradient), state, loss_sum, count, self._is_sound, max_norm
        )
        views = self._parameters.put(updated)
        del parameters, gradient, state  # MLX may compute in the memory of the old ones
        arrays = [loss, norm, self._is_sound, *updated.values(), *views]
        arrays += [value for _, value in tree_flatten(self._optimizer.state)]
        start(arrays)
        return loss, norm

    def _before(self, rate: float) -> tuple[dict[str, mx.array], OptimizerState]:
        self._optimizer.learning_rate = rate
        return self._parameters.get(), self._optimizer.state

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
        kept = {key: mx.where(is_sound, value, parameters[key]) for key, value in updated.items()}
        return kept, state, loss, norm, is_sound

    def _updated_by_name(
        self, parameters: dict[str, mx.array], gradient: Mapping[str, mx.array], state: OptimizerState, scale: mx.array
    ) -> tuple[dict[str, mx.array], OptimizerState]:
        return self._updated(parameters, self._parameters.join(gradient), state, scale)

    def _updated(
        self,
        parameters: dict[str, mx.array],
        gradient: dict[str, mx.array],
        state: OptimizerState,
        scale: mx.array,
    ) -> tuple[dict[str, mx.array], OptimizerState]:
        """The parameters and the optimizer's state after an update; both are joined, and so is the gradient."""
        optimizer, by_element = self._optimizer, type(self._optimizer).__name__ in _BY_ELEMENT
        optimizer.state = state
        scaled = {key: (gradient[key] * scale).astype(value.dtype) for key, value in parameters.items()}
        before = parameters
        if not by_element:
            scaled, before = self._parameters.split(scaled), self._parameters.split(parameters)
        trees = (tree_unflatten(list(values.items())) for values in (scaled, before))
        updated: dict[str, mx.array] = dict(tree_flatten(optimizer.apply_gradients(*trees)))
        return updated if by_element else self._parameters.join(updated), optimizer.state
