"""Next-token cross-entropy, summed over target positions only.

The loss is a (sum, count) pair, never a mean: sums of different nodes and micro-batches add up exactly to what one
machine would have computed. Positions that are padding or prompt get no head: of a masked batch most positions need
no logits, and the logits are by far the largest matrix of a step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from macft.data.batch import Batch, coarse_targets
from macft.training.cross_entropy import (
    blockwise_cross_entropy,
    chunked_cross_entropy,
    fast_on_cpu,
    head_is_frozen,
    head_matrix,
)

_TARGET_MULTIPLE = 32
"""Target counts are padded to a multiple of this, so that few shapes occur and freed buffers are used again."""

Head = Callable[[Any], Any]


class _Passthrough(nn.Module):
    """Stands in for a model's backbone: hands on hidden states that were computed before."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        object.__setattr__(self, "_backbone", backbone)

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_backbone"), name)

    def __call__(self, hidden: Any, *_args: Any, **_kwargs: Any) -> Any:
        return hidden


def split_head(model: nn.Module) -> tuple[Callable[[Any], Any], Head] | None:
    """Cuts an mlx-lm model into backbone (tokens -> hidden states) and head (hidden states -> logits).

    The head is the model's own code with its backbone passed over, so tied embeddings, scaled and soft-capped
    logits come out as the model makes them. Returns None where the two parts don't reproduce the model on a short
    input; the caller then uses the whole model.
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
    return (backbone, shell) if same else None


def target_positions(
    batch: Batch, *, coarse: bool = False
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]]:
    """Where a batch has targets: flat input positions (n,), target tokens (n,) and weights (n,), 1 or, for filling, 0.

    The input of a batch (rows, length) is its tokens without the last column; positions count over that, row by row.
    ``coarse``: n is one of few sizes, for compiled steps.
    """
    rows, length = batch.tokens.shape
    column = np.arange(1, length)[None, :]
    is_target = (column >= np.maximum(batch.prompt_lengths, 1)[:, None]) & (column < batch.lengths[:, None])
    positions = np.flatnonzero(is_target).astype(np.int32)
    count = len(positions)
    filled = max(_TARGET_MULTIPLE, -(-count // _TARGET_MULTIPLE) * _TARGET_MULTIPLE)
    filled = coarse_targets(count, rows * (length - 1)) if coarse else filled
    index = np.zeros(filled, dtype=np.int32)
    index[:count] = positions
    weights = np.zeros(filled, dtype=np.float32)
    weights[:count] = 1.0
    return index, np.ascontiguousarray(batch.tokens[:, 1:]).reshape(rows * (length - 1))[index], weights


class TokenLoss:
    """``(inputs (rows, length), positions (n,), targets (n,), weights (n,)) -> summed cross-entropy``, float32."""

    def __init__(self, model: nn.Module, *, chunk: int | None = None):
        self._model = model
        self._parts = split_head(model)
        self._chunk = chunk
        self._chunked = self._parts is not None and head_is_frozen(model)
        self._matrix = head_matrix(model, self._parts[1]) if self._parts is not None and self._chunked else None

    @property
    def head_on_targets_only(self) -> bool:
        """Whether this model's head could be separated from its backbone."""
        return self._parts is not None

    def __call__(self, inputs: Any, positions: Any, targets: Any, weights: Any) -> Any:
        if self._parts is not None:
            backbone, head = self._parts
            hidden = backbone(inputs)
            hidden = hidden.reshape(-1, hidden.shape[-1])[positions]
            if fast_on_cpu(self._matrix, hidden):
                return blockwise_cross_entropy(
                    self._matrix, hidden, targets, weights, at_once=self._chunk, with_gradient=self._model.training
                )
            if self._chunked and self._model.training:
                return chunked_cross_entropy(head, hidden, targets, weights, wanted_chunk=self._chunk)
            logits = head(hidden[None])[0]
        else:
            logits = self._model(inputs)
            logits = logits.reshape(-1, logits.shape[-1])[positions]
        losses = nn.losses.cross_entropy(logits.astype(mx.float32), targets)
        return (losses * weights).sum()
