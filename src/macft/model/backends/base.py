"""The interface of kernel backends.

A backend knows how attention, activations, loss and gradient of a model are computed. :meth:`Backend.installed` gives
one model the backend's operations and takes them back at the end; no other model and nothing of MLX or mlx-lm changes.

Shapes: B rows, L tokens of a sequence, D hidden size, V vocabulary, N target positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol, TypeVar

import mlx.core as mx
import mlx.nn as nn

from macft.model.head import Head

Item = TypeVar("Item")
Result = TypeVar("Result")
Function = Callable[..., mx.array]
"""Arrays to an array."""
Loss = Callable[..., mx.array]
"""Arrays to a scalar."""
LossAndGradient = Callable[..., tuple[mx.array, dict[str, mx.array]]]
"""The same arrays to the scalar and its gradient by parameter name."""


class CrossEntropy(Protocol):
    """The loss of targets, made once for a model by :meth:`Backend.cross_entropy`."""

    def __call__(self, hidden: mx.array, targets: mx.array, weights: mx.array, *, with_gradient: bool) -> mx.array:
        """``sum(weights * cross_entropy(head(hidden), targets))`` in nats, a float32 scalar.

        ``hidden`` (N, D), or logits (N, V) where the head is None; ``targets`` (N,) int32; ``weights`` (N,) float32.
        ``with_gradient``: the caller may take the gradient.
        """
        ...


class Lanes(Protocol):
    """Parts of a batch computed at the same time, in a thread each, or one after the other in the caller's."""

    @property
    def models(self) -> Sequence[nn.Module]:
        """The installed model, and replicas of it, which hold the same arrays, for other threads."""
        ...

    def map(self, function: Callable[[int, Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        """``function(lane, item)`` of each item, in their order; ``lane`` is the index of the model that it may use.

        At most as many items as there are lanes are begun before their results are taken. The results hold values,
        nothing that is still to be computed. What ``function`` raises is raised here, after the others have ended.
        """
        ...


class Backend(Protocol):
    """One way to compute a model; :func:`macft.model.backends.choose.make_backend` makes it."""

    @property
    def name(self) -> str:
        """As in ``training.kernels``."""
        ...

    @property
    def is_eager(self) -> bool:
        """Whether a gradient is computed as it is asked for, not when MLX evaluates its graph."""
        ...

    def installed(self, model: nn.Module) -> AbstractContextManager[None]:
        """Inside, this backend computes ``model``, for training and inference; the adapter must be attached before.

        Raises:
            ConfigError: the execution packs rows and this model can't take them.
        """
        ...

    def lanes(self, model: nn.Module) -> Lanes:
        """What computes parts of a batch of ``model``, which must be installed."""
        ...

    def cross_entropy(self, head: Head | None) -> CrossEntropy:
        """The loss of hidden states under ``head``; None: of logits."""
        ...

    def types_in_products(self, model: nn.Module) -> Mapping[str, mx.Dtype]:
        """By name, trainable parameters of ``model`` that are used in another type than their own, and that type."""
        ...

    def value_and_grad(self, model: nn.Module, loss: Loss) -> LossAndGradient:
        """``loss`` with its gradient by the trainable parameters of ``model``, which must be installed."""
        ...

    def value(self, function: Function, *inputs: mx.array) -> mx.array:
        """``function`` of ``inputs``, as :meth:`value_and_grad` computes it; ``function`` calls parts of the model."""
        ...

    def vjp(
        self, function: Function, inputs: Sequence[mx.array], cotangent: mx.array
    ) -> tuple[mx.array, list[mx.array]]:
        """``function`` of ``inputs``, which have values, and ``cotangent`` times its derivative by each of them."""
        ...
