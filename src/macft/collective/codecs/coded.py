"""A wire codec with error feedback."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from macft.collective.base import Collective
from macft.collective.codecs.base import owed
from macft.collective.codecs.wire_codec import WireCodec


class Coded:
    """bfloat16 or int8 on every hop, error feedback on every hop (Karimireddy et al. 2019, arXiv:1901.09847).

    In an all-reduce a rank encodes each part of the gradient exactly once: a partial sum, or as its owner the total.
    So one memory of the gradient's size holds what this rank has rounded away, and it adds that the next time.
    """

    def __init__(self, codec: WireCodec):
        self.name = codec.name
        self._codec = codec
        self._residuals: dict[str, NDArray[np.float32]] = {}

    def all_reduce(self, collective: Collective, names: Sequence[str], arrays: Sequence[Any]) -> None:
        """As of :class:`~macft.collective.codecs.base.GradientCodec`."""
        if collective.world_size == 1:
            return
        flats = [np.asarray(array).reshape(-1) for array in arrays]
        fused = np.concatenate(flats)
        key = f"residual/{names[0]}"
        residual = self._residuals.setdefault(key, np.zeros(fused.size, np.float32))
        collective.all_reduce_coded(fused, self._codec, residual)
        start = 0
        for flat in flats:
            flat[:] = fused[start : start + flat.size]
            start += flat.size

    def state(self) -> dict[str, NDArray[np.float32]]:
        """What was rounded away, by bucket."""
        return dict(self._residuals)

    def load(self, states: Sequence[Mapping[str, NDArray[np.float32]]], rank: int, world_size: int) -> None:
        """Goes on with what was rounded away."""
        self._residuals = owed(states, rank, world_size, "residual/")
