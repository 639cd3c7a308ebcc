"""A language model cut into its backbone (tokens to hidden states) and its head (hidden states to logits).

Positions that are padding or prompt need no logits, and logits are by far the largest matrix of a step: so the loss
computes the backbone for all tokens, and the head for the targets only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from macft.model.module_classes import Members, replaced_members

Backbone = Callable[[mx.array], mx.array]
_PROBE_TOKENS = 8


class _Reached(Exception):
    """Carries the hidden states out of a model that has come to the end of its backbone."""

    def __init__(self, hidden: Any):
        super().__init__()
        self.hidden = hidden


class _ModelUpToHead:
    """``tokens (rows, n) -> hidden (rows, n, d)``: the model's own code up to the end of ``backbone``, a module inside.

    The module isn't called directly, as models give theirs other arguments besides the tokens.
    """

    def __init__(self, model: nn.Module, backbone: nn.Module):
        self._model = model
        self._backbone = backbone

    def __call__(self, tokens: mx.array) -> mx.array:
        with replaced_members([self._backbone], _raises_its_result):
            try:
                self._model(tokens)
            except _Reached as reached:
                hidden: mx.array = reached.hidden
                return hidden
        raise ValueError("the model doesn't call its backbone")


def _raises_its_result(kind: type[nn.Module]) -> Members:
    def call(module: nn.Module, *arguments: Any, **named: Any) -> Any:
        raise _Reached(kind.__call__(module, *arguments, **named))

    return {"__call__": call}


class Head:
    """``hidden (rows, n, d) -> logits (rows, n, vocabulary)``, as ``model`` makes them.

    It is the model's own code, in which the result of ``backbone``, a module inside, is given. So tied embeddings,
    scaled and soft-capped logits, and what wrappers do, are as the model makes them. Not for several threads.
    """

    def __init__(self, model: nn.Module, backbone: nn.Module):
        self._model = model
        self._backbone = backbone
        # Not in the closure of a class: such are freed late.
        self._given: list[mx.array] = []

    def __call__(self, hidden: mx.array) -> mx.array:
        """The logits of ``hidden``."""
        self._given.append(hidden)
        try:
            with replaced_members(
                [self._backbone], lambda _kind: {"__call__": lambda *_args, **_named: self._given[0]}
            ):
                logits: mx.array = self._model(mx.zeros(hidden.shape[:-1], mx.int32))
        finally:
            self._given.clear()
        return logits

    @cached_property
    def is_frozen(self) -> bool:
        """Whether no trainable parameter lies in the head or the (tied) embedding."""
        return trains_only_blocks(self._model)

    @cached_property
    def matrix(self) -> mx.array | None:
        """The float32 weights (vocabulary, d) where logits are the product with them, else None.

        Heads that scale or cap their logits are none.
        """
        in_blocks = {id(module) for block in self._model.layers for module in block.modules()}
        for layer in self._model.modules():
            if id(layer) in in_blocks or not isinstance(layer, nn.Linear | nn.Embedding):
                continue
            matrix: mx.array = layer.weight
            if matrix.dtype != mx.float32 or bool(mx.isnan(matrix[0, 0]).item()):  # NaN: it isn't in memory
                continue
            probe = mx.random.normal((2, matrix.shape[1]), key=mx.random.key(0))
            try:
                logits = self(probe[None])[0]
            except ValueError:  # not the head's: hidden states have another size
                continue
            if logits.shape[-1] == len(matrix) and mx.allclose(logits, probe @ matrix.T, rtol=1e-4, atol=1e-4).item():
                return matrix
        return None


def split_head(model: nn.Module, *, evaluated: bool = True) -> tuple[Backbone, Head] | None:
    """Cuts an mlx-lm model into backbone (rows, length) -> (rows, length, d) and head.

    The backbone is the outermost module around the blocks that doesn't return the logits themselves and with which the
    two parts reproduce the model on a short input: position by position, since the head is given some positions only.
    None if there is no such module; the caller then uses the whole model. Without ``evaluated`` only shapes are
    compared: for a model whose arrays have no values.
    """
    probe = mx.arange(1, 1 + _PROBE_TOKENS)[None]
    for module in reversed(list(_around_blocks(model))):
        backbone, head = _ModelUpToHead(model, module), Head(model, module)
        try:
            if _reproduce(model, backbone, head, probe, evaluated):
                return backbone, head
        except (TypeError, ValueError, AttributeError, RuntimeError, IndexError, KeyError):
            continue
    return None


def trains_only_blocks(model: nn.Module) -> bool:
    """Whether all trainable parameters of ``model`` lie in its blocks."""
    in_blocks = {id(value) for block in model.layers for _, value in tree_flatten(block.trainable_parameters())}
    return all(id(value) in in_blocks for _, value in tree_flatten(model.trainable_parameters()))


def _around_blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The modules of ``model`` that its first block lies in, itself excluded, from the innermost."""
    blocks = getattr(model, "layers", None)
    if not blocks:
        return
    modules: dict[str, Any] = dict(model.named_modules())
    path = next((name for name, module in modules.items() if module is blocks[0]), "")
    while "." in path:
        path = path.rpartition(".")[0]
        if path in modules:
            yield modules[path]


def _reproduce(model: nn.Module, backbone: Backbone, head: Head, probe: mx.array, evaluated: bool) -> bool:
    whole, hidden = model(probe), backbone(probe)
    if not isinstance(hidden, mx.array) or hidden.shape[:-1] != probe.shape or hidden.shape == whole.shape:
        return False
    some = mx.arange(1, probe.shape[1], 3)
    parts, of_some = head(hidden), head(hidden[:, some])
    return all(
        expected.shape == found.shape
        and (not evaluated or bool(mx.allclose(expected, found, rtol=1e-2, atol=1e-2).item()))
        for expected, found in ((whole, parts), (whole[:, some], of_some))
    )
