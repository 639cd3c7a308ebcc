"""A language model cut into its backbone (tokens to hidden states) and its head (hidden states to logits).

Positions that are padding or prompt need no logits, and logits are by far the largest matrix of a step: so the loss
computes the backbone for all tokens, and the head for the targets only.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cached_property
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

Backbone = Callable[[mx.array], mx.array]


class Head:
    """``hidden (rows, n, d) -> logits (rows, n, vocabulary)``, as ``model`` makes them."""

    def __init__(self, model: nn.Module, project: Callable[[mx.array], mx.array]):
        self._model = model
        self._project = project

    def __call__(self, hidden: mx.array) -> mx.array:
        """The logits of ``hidden``."""
        return self._project(hidden)

    @cached_property
    def is_frozen(self) -> bool:
        """Whether no trainable parameter lies in the head or the (tied) embedding."""
        names = [name for name, _ in tree_flatten(self._model.trainable_parameters())]
        return all(name.startswith("model.") and "embed" not in name for name in names)

    @cached_property
    def matrix(self) -> mx.array | None:
        """The float32 weights (vocabulary, d) where logits are the product with them, else None.

        Heads that scale or cap their logits are none.
        """
        layers = [getattr(self._model, "lm_head", None), getattr(self._model.model, "embed_tokens", None)]
        for layer in layers:
            matrix: mx.array | None = layer.weight if isinstance(layer, nn.Linear | nn.Embedding) else None
            if matrix is None or matrix.dtype != mx.float32:
                continue
            probe = mx.random.normal((2, matrix.shape[1]), key=mx.random.key(0))
            logits, product = self(probe[None])[0], probe @ matrix.T
            if logits.shape == product.shape and mx.allclose(logits, product, rtol=1e-4, atol=1e-4).item():
                return matrix
        return None


class _Passthrough(nn.Module):
    """Stands in for a model's backbone: returns hidden states that were computed before."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        object.__setattr__(self, "_backbone", backbone)

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_backbone"), name)

    def __call__(self, hidden: mx.array, *_args: Any, **_kwargs: Any) -> mx.array:
        return hidden


def split_head(model: nn.Module) -> tuple[Backbone, Head] | None:
    """Cuts an mlx-lm model into backbone (rows, length) -> (rows, length, d) and head.

    The head is the model's own code with its backbone left out, so tied embeddings, scaled and soft-capped logits are
    as the model makes them. Returns None where the two parts don't reproduce the model on a short input; the caller
    then uses the whole model.
    """
    backbone = getattr(model, "model", None)
    if not isinstance(backbone, nn.Module):
        return None
    shell = copy.copy(model)
    shell["model"] = _Passthrough(backbone)
    probe = mx.arange(1, 9)[None]
    try:
        whole, parts = model(probe), shell(backbone(probe))
        same = whole.shape == parts.shape and mx.allclose(whole, parts, rtol=1e-2, atol=1e-2).item()
    except (TypeError, ValueError, AttributeError, RuntimeError):
        return None
    return (backbone, Head(model, shell)) if same else None
