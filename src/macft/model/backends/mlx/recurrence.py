"""Layers that go through a row token by token, as state spaces and linear attention do: computed in chunks of time.

mlx-lm has kernels for generation. Training runs its plain loops, on a GPU too, and the backward pass then holds the
states, and all that made them, of each token. Here it holds the state at the beginning of each chunk, and computes a
chunk again when it comes to it. A chunk is the layer's own code, with the cache in which it would keep its state while
it generates.
"""

from __future__ import annotations

import inspect
import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import ArraysCache

from macft.model.adapters.dropout import positions_from
from macft.model.module_classes import Members, ModuleCall, replaced_members
from macft.model.parameter_refs import ParameterRefs

Arrays = tuple[mx.array, ...]
Recomputed = Callable[[Callable[..., Arrays], ParameterRefs], Callable[..., Arrays]]
"""A function of arrays that uses a module's trained parameters to the same, of which a gradient holds inputs only."""
Recurrences = Mapping[int, tuple[nn.Module, int]]
"""Layers by their id, each with the number of arrays that it keeps from token to token."""
CHUNK = 16
"""Tokens in a chunk. What is held grows with it and with the number of chunks."""
_TRIAL_CHUNK, _TRIAL_TOKENS = 4, 14


def checkpointed(function: Callable[..., Arrays], trained: ParameterRefs) -> Callable[..., Arrays]:
    """``Recomputed`` with MLX's own means."""

    def call(*arrays: mx.array) -> Arrays:
        values = trained.get()

        def computed(values: list[mx.array], *arrays: mx.array) -> Arrays:
            before = trained.get()
            trained.put(values)
            try:
                return function(*arrays)
            finally:
                trained.put(before)

        outputs: Arrays = tuple(mx.checkpoint(computed)(values, *arrays))
        return outputs

    return call


def find_recurrences(model: nn.Module) -> Recurrences:
    """The layers of ``model`` that loop over time while it trains, if they give the same in chunks.

    By trials, in which graphs are built and a few tokens computed; ``model`` must not be installed in a backend yet,
    whose operations may leave no graph. Empty for models that have no such layers.
    """
    if not loops_over_time(model):
        return {}
    was_training = model.training
    model.train()
    try:
        layers = _layers_with_arrays(model, model.make_cache())
        return layers if _reproduces(model, layers) else {}
    except (TypeError, ValueError, AttributeError, RuntimeError):
        return {}
    finally:
        model.train(was_training)


def loops_over_time(model: nn.Module) -> bool:
    """Whether the graph of a row grows with its length, in a model that keeps arrays from token to token.

    Computes nothing.
    """
    was_training = model.training
    model.train()
    try:
        if not any(isinstance(cache, ArraysCache) for cache in model.make_cache()):
            return False
        return _operations(model, 2 * _TRIAL_TOKENS) != _operations(model, _TRIAL_TOKENS)
    except (TypeError, ValueError, AttributeError, RuntimeError):
        return False
    finally:
        model.train(was_training)


@contextmanager
def chunked_recurrences(
    layers: Recurrences, recomputed: Recomputed = checkpointed, chunk: int = CHUNK
) -> Iterator[None]:
    """Inside, ``layers`` are computed in chunks of ``chunk`` tokens while their model trains, as described above."""
    trained = {key: ParameterRefs(layer) for key, (layer, _) in layers.items()}

    def members(kind: type[nn.Module]) -> Members:
        call, signature = kind.__call__, inspect.signature(kind.__call__)

        def chunked_call(layer: nn.Module, *arguments: Any, **named: Any) -> Any:
            given = signature.bind(layer, *arguments, **named).arguments
            arrays = {name: value for name, value in given.items() if isinstance(value, mx.array)}
            rows_and_time = next(iter(arrays.values())).shape[:2]
            is_generating = given.get("cache") is not None or not layer.training
            if is_generating or rows_and_time[1] <= chunk:
                return call(layer, *arguments, **named)
            others = {name: value for name, value in given.items() if name not in arrays and value is not layer}
            step = _Step(call, layer, layers[id(layer)][1], list(arrays), others)
            return step.over_time(lambda part: recomputed(part, trained[id(layer)]), arrays, rows_and_time, chunk)

        return {"__call__": chunked_call}

    with replaced_members((layer for layer, _ in layers.values()), members):
        yield


def _layers_with_arrays(model: nn.Module, cache: Any) -> Recurrences:
    """The innermost layers that are given arrays to keep from token to token."""
    found: dict[int, tuple[nn.Module, int]] = {}

    def noting(kind: type[nn.Module]) -> Members | None:
        call = kind.__call__
        if "cache" not in inspect.signature(call).parameters:
            return None

        def noting_call(module: nn.Module, *arguments: Any, **named: Any) -> Any:
            for value in (*arguments, *named.values()):
                if isinstance(value, ArraysCache):
                    found[id(module)] = module, len(value.cache)
            return call(module, *arguments, **named)

        return {"__call__": noting_call}

    inner = [module for block in model.layers for module in block.modules() if module is not block]
    with replaced_members(inner, noting):
        model(_tokens(2), cache=cache)
    modules = [module for module, _ in found.values()]
    around = {id(outer) for outer in modules for one in outer.modules() if one is not outer and id(one) in found}
    return {key: value for key, value in found.items() if key not in around}


def _operations(model: nn.Module, tokens: int) -> int:
    """The size of the graph for a row of ``tokens``; computes nothing."""
    text = io.StringIO()
    mx.export_to_dot(text, model(_tokens(tokens)))
    return text.getvalue().count("\n")


def _tokens(count: int) -> mx.array:
    return mx.arange(1, 1 + count)[None]


def _reproduces(model: nn.Module, layers: Recurrences) -> bool:
    whole = model(_tokens(_TRIAL_TOKENS))
    with chunked_recurrences(layers, lambda function, _trained: function, _TRIAL_CHUNK):
        parts = model(_tokens(_TRIAL_TOKENS))
    return whole.shape == parts.shape and bool(mx.allclose(whole, parts, rtol=1e-2, atol=1e-2).item())


class _Step:
    """A chunk of a layer, as a function of arrays: those of its arguments and, from the second chunk on, its state.

    It begins at token ``start`` of the rows and returns the arrays of the result, and the state.
    """

    def __init__(self, call: ModuleCall, layer: nn.Module, states: int, names: list[str], others: dict[str, Any]):
        self._call, self._layer, self._states = call, layer, states
        self._names, self._others = names, others
        # Which of the layer's states are in use, and of its results arrays; known after a chunk.
        self._held: list[int] = []
        self._results: list[int] = []
        self._single = True

    def __call__(self, start: int, *arrays: mx.array) -> Arrays:
        cache = ArraysCache(self._states)
        for place, value in zip(self._held, arrays[len(self._names) :], strict=False):
            cache[place] = value
        given = dict(zip(self._names, arrays, strict=False))
        with positions_from(start):
            result = self._call(self._layer, **given, **{**self._others, "cache": cache})
        self._single = not isinstance(result, tuple)
        results = (result,) if self._single else result
        self._results = [place for place, value in enumerate(results) if isinstance(value, mx.array)]
        self._held = [place for place, value in enumerate(cache.cache) if value is not None]
        return (*(results[place] for place in self._results), *(cache[place] for place in self._held))

    def over_time(
        self,
        differentiable: Callable[[Callable[..., Arrays]], Callable[..., Arrays]],
        arrays: Mapping[str, mx.array],
        rows_and_time: tuple[int, ...],
        chunk: int,
    ) -> Any:
        """The layer's result; ``differentiable`` makes of a chunk's function what a gradient goes through."""
        parts: list[Arrays] = []
        state: Arrays = ()
        for start in range(0, rows_and_time[1], chunk):
            slices = [
                value[:, start : start + chunk] if value.shape[:2] == rows_and_time else value
                for value in arrays.values()
            ]
            outputs = differentiable(partial(self, start))(*slices, *state)
            parts.append(outputs[: len(self._results)])
            state = outputs[len(self._results) :]
        results = [mx.concatenate(list(pieces), axis=1) for pieces in zip(*parts, strict=True)]
        return results[0] if self._single else tuple(results)
