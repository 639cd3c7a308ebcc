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
from macft.model.joined_parameters import Joined, JoinedParameters, Part
from macft.training.adam import has_new_parameters, new_parameter
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
    from a hundredth of the operations. The optimizer's state is then that of the long array. Beside parameters, state
    and gradient an update should hold little: see :meth:`__call__` and :mod:`macft.training.adam`.
    """

    def __init__(self, model: nn.Module, optimizer: optim.Optimizer, *, compiled: bool = False):
        self._parameters, self._optimizer = JoinedParameters.of(model), optimizer
        self._by_element = type(optimizer).__name__ in _BY_ELEMENT
        self._compiled: Callable[[Any], Any] = mx.compile if compiled else lambda function: function
        self._update_part = self._compiled(self._updated_part)
        self._update_whole = self._compiled(self._updated_by_name)
        self._find_scalars = self._compiled(_scalars)
        self._find_parameters = self._compiled(self._new_parameters)
        self._find_state: dict[str, Callable[..., dict[str, mx.array]]] = {}
        self._is_sound = mx.array(True)

    def __call__(self, gradient: Mapping[str, mx.array], rate: float, scale: float = 1.0) -> None:
        """One update by ``scale`` times ``gradient``, float32 arrays by the parameters' names.

        Some may be joined, under the name of the first, as for :meth:`JoinedParameters.join`.

        Part by part, each computed before the next one: MLX runs ahead, and what an update of all of them needs in
        between would exist at once, up to six times the parameters.
        """
        self._begin(rate)
        if self._by_element:
            self._update_by_parts(gradient, mx.array(scale))
            return
        parameters, state = self._parameters.get(), self._optimizer.state
        updated, self._optimizer.state = self._update_whole(parameters, dict(gradient), state, mx.array(scale))
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
        self._begin(rate)
        parameters, state = self._parameters.get(), self._optimizer.state
        count = mx.array(float(target_tokens))
        loss, norm, scale, self._is_sound = self._find_scalars(
            dict(gradient), loss_sum, count, self._is_sound, max_norm
        )
        # Each kind of state by itself, then the parameters: a kernel of one result takes the memory of what it reads.
        after: dict[str, mx.array] = {}
        for kind in sorted({_kind(name) for name, _ in tree_flatten(state)}):
            find = self._find_state.setdefault(kind, self._compiled(partial(self._state_of_kind, kind)))
            after |= find(parameters, dict(gradient), state, scale)
        of_state = tree_unflatten(list(after.items()))
        before = of_state if has_new_parameters(self._optimizer) else state
        updated = self._find_parameters(parameters, dict(gradient), before, scale, self._is_sound)
        self._optimizer.state = of_state
        views = self._parameters.put(updated)
        del parameters, gradient, state, before  # MLX may compute in the memory of the old ones
        start([loss, norm, self._is_sound, *updated.values(), *views, *after.values()])
        return loss, norm

    def _begin(self, rate: float) -> None:
        """Sets the learning rate, and makes the optimizer's state where there is none."""
        optimizer = self._optimizer
        optimizer.learning_rate = rate
        joined: Joined = self._parameters.get()
        optimizer.init(tree_unflatten(list((joined if self._by_element else self._parameters.split(joined)).items())))

    def _update_by_parts(self, gradient: Mapping[str, mx.array], scale: mx.array) -> None:
        parameters, state = self._parameters.take(), dict(tree_flatten(self._optimizer.state))
        self._optimizer.state = {}
        counters = {name: value for name, value in state.items() if "." not in name}
        kinds = sorted({_kind(name) for name in state} - set(counters))
        after: dict[str, mx.array] = {}
        try:
            for part in self._parameters.parts():
                of_kinds = {kind: _cut(state[f"{part.key}.{kind}"], part) for kind in kinds}
                pieces = self._parameters.pieces(gradient, part)
                new, of_kinds, after = self._update_part(
                    _cut(parameters[part.key], part), pieces, of_kinds, counters, scale
                )
                mx.eval(new, of_kinds, after)
                _write(parameters, part.key, part, new)
                for kind, value in of_kinds.items():
                    _write(state, f"{part.key}.{kind}", part, value)
                del new, of_kinds, pieces
        finally:
            mx.eval(self._parameters.put(parameters))
            self._optimizer.state = tree_unflatten(list((state | after).items()))

    def _updated_part(
        self,
        parameter: mx.array,
        pieces: list[mx.array],
        state: dict[str, mx.array],
        counters: dict[str, mx.array],
        scale: mx.array,
    ) -> tuple[mx.array, dict[str, mx.array], dict[str, mx.array]]:
        """A part of the parameters and of their state after an update, and what the optimizer counts."""
        gradient = pieces[0] if len(pieces) == 1 else mx.concatenate([piece.reshape(-1) for piece in pieces])
        scaled = (gradient.reshape(parameter.shape) * scale).astype(parameter.dtype)
        optimizer = self._optimizer
        optimizer.state = {**counters, "part": dict(state)}
        updated: dict[str, mx.array] = optimizer.apply_gradients({"part": scaled}, {"part": parameter})
        return updated["part"], optimizer.state["part"], {name: optimizer.state[name] for name in counters}

    def _updated_by_name(
        self, parameters: dict[str, mx.array], gradient: Mapping[str, mx.array], state: OptimizerState, scale: mx.array
    ) -> tuple[dict[str, mx.array], OptimizerState]:
        return self._updated(parameters, self._parameters.join(gradient), state, scale)

    def _state_of_kind(
        self,
        kind: str,
        parameters: dict[str, mx.array],
        gradient: dict[str, mx.array],
        state: OptimizerState,
        scale: mx.array,
    ) -> dict[str, mx.array]:
        """Of the state after an update, the arrays of one kind, by the names of their leaves."""
        arrays = tree_flatten(self._updated(parameters, gradient, state, scale)[1])
        return {name: value for name, value in arrays if _kind(name) == kind}

    def _new_parameters(
        self,
        parameters: dict[str, mx.array],
        gradient: dict[str, mx.array],
        state: OptimizerState,
        scale: mx.array,
        is_sound: mx.array,
    ) -> dict[str, mx.array]:
        """The parameters after an update; ``state`` is that after it, if they follow from it, or else before."""
        if has_new_parameters(self._optimizer):
            self._optimizer.state, arrays = state, dict(tree_flatten(state))
            updated = {
                key: new_parameter(self._optimizer, value, arrays[f"{key}.m"], arrays[f"{key}.v"])
                for key, value in parameters.items()
            }
        else:
            updated = self._updated(parameters, gradient, state, scale)[0]
        return {key: mx.where(is_sound, value, parameters[key]) for key, value in updated.items()}

    def _updated(
        self,
        parameters: dict[str, mx.array],
        gradient: dict[str, mx.array],
        state: OptimizerState,
        scale: mx.array,
    ) -> tuple[dict[str, mx.array], OptimizerState]:
        """The parameters and the optimizer's state after an update; both are joined, and so is the gradient."""
        optimizer = self._optimizer
        optimizer.state = tree_map(lambda value: value, state)  # a copy, which the update writes to
        scaled = {key: (gradient[key] * scale).astype(value.dtype) for key, value in parameters.items()}
        before = parameters
        if not self._by_element:
            scaled, before = self._parameters.split(scaled), self._parameters.split(parameters)
        trees = (tree_unflatten(list(values.items())) for values in (scaled, before))
        updated: dict[str, mx.array] = dict(tree_flatten(optimizer.apply_gradients(*trees)))
        return updated if self._by_element else self._parameters.join(updated), optimizer.state


def _kind(name: str) -> str:
    """What an array of an optimizer's state is to its parameter, or what the optimizer counts."""
    return name.rpartition(".")[2]


def _scalars(
    gradient: dict[str, mx.array], loss_sum: mx.array, target_tokens: mx.array, is_sound: mx.array, max_norm: float
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """Loss, norm of its gradient, the gradient's factor, and whether all was finite until now."""
    squares = [mx.square(value).sum() for value in gradient.values()]
    norm_of_sum = mx.sqrt(sum(squares, mx.array(0.0)))
    loss, norm, scale, is_finite = clip_by_global_norm(loss_sum, norm_of_sum, target_tokens, max_norm, xp=mx)
    return loss, norm, scale, is_sound & is_finite


def _cut(array: mx.array, part: Part) -> mx.array:
    return array if array.size == part.end - part.start else array[part.start : part.end]


def _write(arrays: dict[str, mx.array], key: str, part: Part, values: mx.array) -> None:
    """Puts ``values`` into ``arrays[key]``, in its memory, where nobody else holds it."""
    if values.size == arrays[key].size:
        arrays[key] = values
        return
    arrays[key][part.start : part.end] = values
    mx.eval(arrays[key])
