"""Error feedback: what a wire codec loses in one step is added in the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from macft.collective.base import Collective, ReducibleArray
from macft.collective.codecs.base import restore_residuals
from macft.collective.codecs.quantization import WireCodec


class ErrorFeedback:
    """Encodes every hop with ``codec``, with error feedback (Karimireddy et al. 2019, arXiv:1901.09847).

    In an all-reduce a rank encodes each part of the gradient exactly once: a partial sum, or, as its owner, the total.
    So one residual of the gradient's size holds this rank's rounding error, which is added in the next step.
    """

    needs_matrices = False

    def __init__(self, codec: WireCodec):
        self.name = codec.name
        self._codec = codec
        self._residuals: dict[str, NDArray[np.float32]] = {}

    def all_reduce(self, collective: Collective, names: Sequence[str], arrays: Sequence[ReducibleArray]) -> None:
        """See :class:`~macft.collective.codecs.base.GradientCodec`."""
        if collective.world_size == 1:
            return
        flats: list[NDArray[np.float32]] = [np.asarray(array).reshape(-1) for array in arrays]
        fused = flats[0] if len(flats) == 1 else np.concatenate(flats)
        key = f"residual/{names[0]}"
        residual = self._residuals.get(key)
        if residual is None or residual.size != fused.size:  # a checkpoint may have had other buckets
            residual = self._residuals[key] = np.zeros(fused.size, np.float32)
        collective.all_reduce_coded(fused, self._codec, residual)
        if len(flats) == 1:  # summed where it lies
            return
        start = 0
        for flat in flats:
            flat[:] = fused[start : start + flat.size]
            start += flat.size

    def state(self) -> dict[str, NDArray[np.float32]]:
        """The residuals, by bucket."""
        return dict(self._residuals)

    def load(self, states: Sequence[Mapping[str, NDArray[np.float32]]], rank: int, world_size: int) -> None:
        """Continues with the residuals of ``states``."""
        self._residuals = restore_residuals(states, rank, world_size, "residual/")


def encode_with_feedback(codec: WireCodec, values: NDArray[np.float32], residual: NDArray[np.float32]) -> memoryview:
    """Encodes ``values`` plus the rounding error of the previous time, and keeps the new rounding error.

    Args:
        codec: How to encode.
        values: float32, shape (n,); not changed.
        residual: float32, shape (n,); the rounding error, replaced in place.

    Returns:
        ``codec.encoded_bytes(n)`` bytes.
    """
    residual += values
    encoded = codec.encode(residual).data
    residual -= codec.decode(encoded, residual.size)
    return encoded
