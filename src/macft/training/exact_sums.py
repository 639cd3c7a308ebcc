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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from macft.data.batch import Batch
from macft.model.execution import Execution
from macft.training.exact_loss import exact_loss
from macft.training.gradient import Gradient, LocalGradient, StepGradient
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
    """A :class:`LocalGradient` whose sums are ``halves``, (2, size) by parameter name; ``gradient`` is empty."""

    halves: Mapping[str, Halves] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def loss_sum(self) -> float:
        """See :class:`LocalGradient`; on a grid."""
        return float(sum(exact_loss(float(np.asarray(loss))) for loss in self.losses))


class ExactStepGradient:
    """Computes each micro-batch by itself with ``inner`` and adds the gradients up exactly.

    Args:
        inner: Computes; each of its calls gets one micro-batch.
        shapes: Of the trainable parameters, by name.
        buckets: Their names, in groups that travel together.
    """

    def __init__(self, inner: StepGradient, shapes: Mapping[str, tuple[int, ...]], buckets: Sequence[Sequence[str]]):
        self._inner, self._shapes, self._buckets = inner, dict(shapes), buckets

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
        in_buckets: bool = True,  # noqa: ARG002
    ) -> LocalGradient:
        """See :class:`~macft.training.gradient.StepGradient`."""
        halves = {name: np.zeros((2, int(np.prod(shape)))) for name, shape in self._shapes.items()}
        parts: list[LocalGradient] = []
        for batch in batches:
            parts.append(self._inner(step, [batch], before_micro_batch, in_buckets=False))
            if len(parts) > 1:  # while the device computes the newest one
                _add(halves, parts[-2].gradient)
                parts[-2] = replace(parts[-2], gradient={})
        if not parts:
            parts = [self._inner(step, [], before_micro_batch, in_buckets=False)]
        _add(halves, parts[-1].gradient)
        first = parts[0]
        waits = [part.waited_for_weights for part in parts if part.waited_for_weights is not None]
        return ExactGradient(
            gradient={},
            buckets=self._buckets,
            losses=[loss for part in parts for loss in part.losses],
            target_tokens=sum(part.target_tokens for part in parts),
            tokens=sum(part.tokens for part in parts),
            started=first.started,
            waited_for_weights=sum(waits) if waits else None,
            weights_read=sum(part.weights_read for part in parts),
            traces=max(part.traces for part in parts),
            halves=halves,
            shapes=self._shapes,
        )


def _add(halves: Mapping[str, Halves], gradient: Gradient) -> None:
    mx.eval(list(gradient.values()))
    for name, value in gradient.items():
        to_grid(np.asarray(value).reshape(-1), halves[name])
