"""Sums of gradients that have the same bits in any order: ``training.deterministic``.

Floating-point addition rounds, so a sum depends on who adds what first. Here each part of a step is a fixed set of
rows, whoever computes it, and its gradient is rounded to a grid that never changes: multiples of 2^-52, as two float64
numbers, one a multiple of 2^-8 and one the rest. Sums of such numbers are exact as long as they stay below 2^53 steps
of their grid, so they are the same in any order, over any number of nodes. (Fixed-point accumulation, as in Demmel and
Nguyen, "Parallel Reproducible Summation", IEEE Transactions on Computers 64(7), 2015, with a grid that is not searched
for.)

A float32 of 2^-28 or more is on the grid as it is; what is smaller is rounded by 2^-53 at most, and gradients here are
sums over the tokens of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from numpy.typing import NDArray

from macft.data.batch import Batch
from macft.model.execution import Execution
from macft.training.gradients.buckets import Gradient, names_in_buckets
from macft.training.gradients.exact_loss import exact_loss
from macft.training.gradients.gradient import Form, LocalGradient, StepGradient
from macft.training.settings import MOST_PARTS
from macft.training.validation import Losses

_COARSE, _FINE = 2.0**-8, 2.0**-52
_LIMIT = 2.0**53 * _COARSE / MOST_PARTS
"""Values of a part from here on, 3e10, count as infinite."""

Halves = NDArray[np.float64]
"""(2, n): multiples of 2^-8, and the rests, multiples of 2^-52."""


def to_grid(values: NDArray[np.float32], out: Halves) -> None:
    """Adds ``values`` (n,), rounded to the grid, to ``out``; what is too large, or not finite, as NaN."""
    wide = values.astype(np.float64)
    np.copyto(wide, np.nan, where=~(np.abs(wide) < _LIMIT))
    coarse = np.rint(wide / _COARSE) * _COARSE
    out[0] += coarse
    out[1] += np.rint((wide - coarse) / _FINE) * _FINE


def from_grid(halves: Halves) -> NDArray[np.float32]:
    """The sum as float32, (n,)."""
    total: Halves = halves[0] + halves[1]
    return total.astype(np.float32)


@dataclass(frozen=True)
class ExactGradient(LocalGradient):
    """A :class:`LocalGradient` whose sums are ``halves``, (2, size) by parameter name; ``gradient`` is empty.

    They travel in ``names_in_buckets``.
    """

    halves: Mapping[str, Halves] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    names_in_buckets: Sequence[Sequence[str]] = ()

    @property
    def loss_sum(self) -> float:
        """See :class:`LocalGradient`; on a grid."""
        return float(sum(exact_loss(float(np.asarray(loss))) for loss in self.losses))


@dataclass(frozen=True)
class ExactParameters:
    """The trainable parameters: ``shapes`` by name, and their names in ``buckets``, groups that travel together."""

    shapes: Mapping[str, tuple[int, ...]]
    buckets: Sequence[Sequence[str]]

    @classmethod
    def of(cls, model: nn.Module, bucket_bytes: int) -> ExactParameters:
        """Those of ``model``, in groups of which the sums take about ``bucket_bytes``."""
        parameters = dict(tree_flatten(model.trainable_parameters()))
        shapes = {name: value.shape for name, value in parameters.items()}
        return cls(shapes, names_in_buckets(parameters, bucket_bytes // 4))


class ExactSums:
    """The sums of the gradients of a step's micro-batches."""

    def __init__(self, parameters: ExactParameters):
        self._parameters = parameters
        self._halves = {name: np.zeros((2, math.prod(shape))) for name, shape in parameters.shapes.items()}

    def add(self, gradient: Gradient) -> None:
        """Adds that of a whole micro-batch, of all parameters or some of them; waits for MLX."""
        mx.eval(list(gradient.values()))
        for name, value in gradient.items():
            to_grid(np.asarray(value).reshape(-1), self._halves[name])

    def result(self, local: LocalGradient) -> ExactGradient:
        """``local`` with these sums as its gradient."""
        own = {each.name: getattr(local, each.name) for each in fields(LocalGradient)}
        own |= {"gradient": {}, "buckets": ()}
        parameters = self._parameters
        return ExactGradient(**own, halves=self._halves, shapes=parameters.shapes, names_in_buckets=parameters.buckets)


class ExactStepGradient:
    """Computes each micro-batch by itself with ``inner`` and adds the gradients of ``parameters`` up exactly."""

    def __init__(self, inner: StepGradient, parameters: ExactParameters):
        self._inner, self._parameters = inner, parameters

    @property
    def execution(self) -> Execution:
        """How the rows are computed."""
        return self._inner.execution

    @property
    def loss(self) -> Losses:
        """The loss without a gradient, for validation."""
        return self._inner.loss

    def adopt(self, execution: Execution) -> None:
        """See :class:`~macft.training.gradient.StepGradient`."""
        self._inner.adopt(execution)

    def __call__(
        self,
        step: int,
        batches: Sequence[Batch],
        before_micro_batch: Callable[[], None] = lambda: None,
        *,
        form: Form = "parameters",  # noqa: ARG002
    ) -> LocalGradient:
        """See :class:`~macft.training.gradient.StepGradient`."""
        sums, parts = ExactSums(self._parameters), list[LocalGradient]()
        for batch in batches:
            parts.append(self._inner(step, [batch], before_micro_batch))
            if len(parts) > 1:  # while the device computes the newest one
                sums.add(parts[-2].gradient)
                parts[-2] = replace(parts[-2], gradient={})
        if not parts:
            parts = [self._inner(step, [], before_micro_batch)]
        sums.add(parts[-1].gradient)
        waits = [part.waited_for_weights for part in parts if part.waited_for_weights is not None]
        return sums.result(
            replace(
                parts[0],
                losses=[loss for part in parts for loss in part.losses],
                target_tokens=sum(part.target_tokens for part in parts),
                tokens=sum(part.tokens for part in parts),
                waited_for_weights=sum(waits) if waits else None,
                weights_read=sum(part.weights_read for part in parts),
                traces=max(part.traces for part in parts),
            )
        )
