"""Whether a model predicts a token from those before it only, shown by a trial."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

_TOLERANCE = 0.01
"""Relative; the first token of two rows is computed by the same operations, so that there is next to no rounding."""


def sees_later_tokens(model: nn.Module) -> bool:
    """Whether what ``model`` computes for a token depends on tokens behind it.

    Then padding would change the loss, the answers would be known in training, and not be there in generation.
    """
    was_training = model.training
    model.eval()
    logits = model(mx.array([[1, 2, 3, 4, 5, 6, 7, 8], [1, 8, 7, 6, 5, 4, 3, 2]]))[:, 0].astype(mx.float32)
    model.train(was_training)
    one, other = mx.where(mx.isfinite(logits), logits, 0.0)  # some architectures ban tokens by -inf
    return bool((mx.linalg.norm(one - other) > _TOLERANCE * mx.linalg.norm(one)).item())
