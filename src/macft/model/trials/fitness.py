"""Whether training a model makes sense by what its code computes, shown by trials."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from numpy.typing import NDArray

_SEES_LATER = 0.01
"""Relative; the first token of two rows is computed by the same operations, so that there is next to no rounding."""
_OTHER_WITH_CACHE = 0.1
"""Relative; far above the rounding of bfloat16. The median token counts, since a mixture may choose another expert."""


def obstacle_to_training(model: nn.Module) -> str | None:
    """Why ``model`` would learn nothing of use; one line."""
    was_training = model.training
    model.eval()
    try:
        if sees_later_tokens(model):
            return "the code of this model lets a token see later ones, so it can't learn to predict them"
        if differs_in_generation(model):
            return "the code of this model computes other logits in training than in generation, which has a cache"
        return None
    finally:
        model.train(was_training)


def sees_later_tokens(model: nn.Module) -> bool:
    """Whether what ``model`` computes for a token depends on tokens behind it.

    Then padding would change the loss, the answers would be known in training, and not be there in generation.
    """
    first = _finite(model(mx.array([[1, 2, 3, 4, 5, 6, 7, 8], [1, 8, 7, 6, 5, 4, 3, 2]]))[:, 0])
    return bool(_difference(first[0], first[1]) > _SEES_LATER)


def differs_in_generation(model: nn.Module) -> bool:
    """Whether ``model`` computes something else of a row when it is given a cache, as for generation."""
    tokens = mx.arange(1, 9)[None]
    try:
        with_cache = _finite(model(tokens, cache=make_prompt_cache(model))[0])
    except Exception:  # code that was not made for generation; what it says there is not of training
        return False
    return bool(np.median(_difference(_finite(model(tokens)[0]), with_cache)) > _OTHER_WITH_CACHE)


def _finite(logits: mx.array) -> NDArray[np.float32]:
    """With zeros where an architecture bans a token by -inf."""
    return np.asarray(np.nan_to_num(np.array(logits.astype(mx.float32)), posinf=0.0, neginf=0.0))


def _difference(one: NDArray[np.float32], other: NDArray[np.float32]) -> NDArray[np.float32]:
    """Relative, by token."""
    lengths = np.linalg.norm(one, axis=-1)
    return np.asarray(np.linalg.norm(one - other, axis=-1) / lengths, dtype=np.float32)
