"""From summed gradients to the clipped mean gradient."""

from __future__ import annotations

from types import ModuleType
from typing import Generic, NamedTuple, TypeVar

import mlx.core as mx

Scalar = TypeVar("Scalar", float, mx.array)
"""A number, or an array of shape ()."""


class StepScalars(NamedTuple, Generic[Scalar]):
    """Mean loss in nats, L2 norm of its gradient, and the factor of the summed gradient in the update."""

    loss: Scalar
    norm: Scalar
    scale: Scalar
    is_finite: Scalar


def clip_by_global_norm(
    loss_sum: Scalar, norm_of_sum: Scalar, target_tokens: Scalar, max_norm: float, *, xp: ModuleType
) -> StepScalars[Scalar]:
    """From sums over all target tokens to what an update needs: mean, clipping by the global norm, finite or not.

    ``norm_of_sum`` is the L2 norm of the summed gradient. The update uses the summed gradient times ``scale``, whose
    norm is at most ``max_norm``; 0 means no limit. ``xp`` computes: ``numpy`` on numbers, or ``mlx.core`` on arrays of
    shape () that may not have been computed yet.
    """
    count = xp.maximum(target_tokens, 1.0)
    factor = 1.0 / count
    loss, norm = loss_sum / count, factor * norm_of_sum
    clip = max_norm / xp.maximum(norm, max_norm) if max_norm else 1.0
    return StepScalars(loss, norm, factor * clip, xp.isfinite(loss) & xp.isfinite(norm))
