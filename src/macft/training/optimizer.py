"""The optimizer update: learning rate of a step, clipping by the global norm, an MLX optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from macft.device.mlx_device import start
from macft.errors import ConfigError
from macft.model.joined_parameters import Joined, JoinedParameters
from macft.training.adam import is_adam, parameter_after
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
        self._by_element = type(optimizer).__name__ in _BY_ELEMENT
        self._compile: Callable[[Any], Any] = mx.compile if compiled else lambda function: function
        self._find_scalars = self._compile(_scalars)
        self._find_parameters = self._compile(self._new_parameters)
        self._find_state: dict[str, Callable[..., dict[str, mx.array]]] = {}
        self._is_sound = mx.array(True)

    def __call__(self, gradient: Mapping[str, mx.array], rate: float, scale: float = 1.0) -> None:
        """One update by ``scale`` times ``gradient``, float32 arrays by the parameters' names.

        Some may be joined, under the name of the first, as for :meth:`JoinedParameters.join`.
        """
        joined = self._parameters.join(gradient)
        del gradient
        mx.eval(self._update(joined, rate, mx.array(scale), mx.array(True)))

    def queue(
        self, gradient: Joined, rate: float, loss_sum: mx.array, target_tokens: int, max_norm: float
    ) -> tuple[mx.array, mx.array]:
        """The same for a summed ``gradient`` whose norm is not known yet; nobody waits for it.

        ``gradient`` is joined as the parameters are. Returns the mean loss and the L2 norm of its gradient, float32 (),
        still being computed. Where one of them is not finite, the parameters stay as they are, from then on.
        """
        count = mx.array(float(target_tokens))
        loss, norm, scale, self._is_sound = self._find_scalars(
            dict(gradient), loss_sum, count, self._is_sound, max_norm
        )
        start([loss, norm, self._is_sound, *self._update(gradient, rate, scale, self._is_sound)])
        return loss, norm

    def _update(self, gradient: Joined, rate: float, scale: mx.array, is_sound: mx.array) -> list[mx.array]:
        """Sets the parameters and the optimizer's state; all arrays of both, not computed yet.

        Each kind of result by itself, and Adam's parameters from its new state: then MLX can compute it in the memory
        of the old one, which it never does where a compiled kernel has several results.
        """
        optimizer, parameters = self._optimizer, self._parameters.get()
        optimizer.learning_rate = rate
        if _kinds(optimizer.state) <= {""}:  # no update was before
            trained = parameters if self._by_element else self._parameters.split(parameters)
            optimizer.init(tree_unflatten(list(trained.items())))
        state, after = optimizer.state, dict[str, mx.array]()
        for kind in sorted(_kinds(state)):
            find = self._find_state.setdefault(kind, self._compile(partial(self._state_of_kind, kind)))
            after |= find(parameters, dict(gradient), state, scale)
        new_state = tree_unflatten(list(after.items()))
        given = new_state if is_adam(optimizer) else state
        updated = self._find_parameters(parameters, dict(gradient), given, scale, is_sound)
        optimizer.state = new_state
        views = self._parameters.put(updated)
        return [*updated.values(), *views, *after.values()]

    def _new_parameters(
        self, parameters: Joined, gradient: Joined, state: OptimizerState, scale: mx.array, is_sound: mx.array
    ) -> dict[str, mx.array]:
        """The parameters after an update, or as they were; ``state`` is that before it, or Adam's after it."""
        if is_adam(self._optimizer):
            self._optimizer.state, of = state, dict(tree_flatten(state))
            updated = {
                key: parameter_after(self._optimizer, value, of[f"{key}.m"], of[f"{key}.v"])
                for key, value in parameters.items()
            }
        else:
            updated = self._updated(parameters, gradient, state, scale)[0]
        return _kept_if(is_sound, updated, parameters)

    def _state_of_kind(
        self, kind: str, parameters: Joined, gradient: Joined, state: OptimizerState, scale: mx.array
    ) -> dict[str, mx.array]:
        """Of the state after an update, the arrays of one kind, by the names of their leaves."""
        arrays = tree_flatten(self._updated(parameters, gradient, state, scale)[1])
        return {name: value for name, value in arrays if _kind(name) == kind}

    def _updated(
        self, parameters: Joined, gradient: Joined, state: OptimizerState, scale: mx.array
    ) -> tuple[dict[str, mx.array], OptimizerState]:
        """The parameters and the optimizer's state after an update; both are joined, and so is the gradient."""
        optimizer = self._optimizer
        optimizer.state = tree_map(lambda value: value, state)  # a copy, which the update writes to
        before = parameters
        scaled = {key: (gradient[key] * scale).astype(value.dtype) for key, value in parameters.items()}
        if not self._by_element:
            scaled, before = self._parameters.split(scaled), self._parameters.split(parameters)
        trees = (tree_unflatten(list(values.items())) for values in (scaled, before))
        updated: dict[str, mx.array] = dict(tree_flatten(optimizer.apply_gradients(*trees)))
        return updated if self._by_element else self._parameters.join(updated), optimizer.state


def _kind(name: str) -> str:
    """What an array of an optimizer's state is to its parameter; nothing for what the optimizer counts."""
    return name.rpartition(".")[2] if "." in name else ""


def _kinds(state: OptimizerState) -> set[str]:
    return {_kind(name) for name, _ in tree_flatten(state)}


def _kept_if(is_sound: mx.array, updated: Joined, before: Joined) -> dict[str, mx.array]:
    return {key: mx.where(is_sound, value, before[key]) for key, value in updated.items()}


def _scalars(
    gradient: Joined, loss_sum: mx.array, target_tokens: mx.array, is_sound: mx.array, max_norm: float
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """Loss, norm of its gradient, the gradient's factor, and whether all was finite until now."""
    squares = [mx.square(value).sum() for value in gradient.values()]
    norm_of_sum = mx.sqrt(sum(squares, mx.array(0.0)))
    loss, norm, scale, is_finite = clip_by_global_norm(loss_sum, norm_of_sum, target_tokens, max_norm, xp=mx)
    return loss, norm, scale, is_sound & is_finite
