"""Which positions of a batch have targets."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from macft.data.batch import Batch, coarse_targets

_TARGET_MULTIPLE = 32
"""Target counts are padded to a multiple of this, so that few shapes occur and freed buffers are used again."""


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
