"""Wire codecs: they encode the partial sums of a ring on every hop."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from macft.collective.dtypes import from_bfloat16, to_bfloat16

BLOCK = 256
"""float32 values that share a scale in int8."""


class WireCodec(Protocol):
    """float32 values to fewer bytes and back, lossy. A pure function: equal bytes decode to equal bits."""

    name: str
    ratio: float
    """Encoded bytes per byte of float32, for long arrays."""
    block: int
    """Values that are encoded together. Cut between two blocks, an array decodes to the same bits as in one piece."""

    def encoded_bytes(self, size: int) -> int:
        """The number of bytes that ``size`` values take."""
        ...

    def encode(self, values: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Values (float32, shape (n,)) to bytes (uint8, shape (encoded_bytes(n),))."""
        ...

    def decode(self, data: bytes | memoryview, size: int) -> NDArray[np.float32]:
        """The inverse, up to rounding: float32, shape (size,). NaN and infinity become non-finite values."""
        ...


class Bfloat16:
    """Half the bytes: float32's range with 8 bits of precision."""

    name = "bfloat16"
    ratio = 0.5
    block = 1

    def encoded_bytes(self, size: int) -> int:
        """2 bytes a value."""
        return 2 * size

    def encode(self, values: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Rounds to nearest, ties to even."""
        return to_bfloat16(values).view(np.uint8)

    def decode(self, data: bytes | memoryview, size: int) -> NDArray[np.float32]:
        """Exact."""
        return from_bfloat16(np.frombuffer(data, np.uint16, size))


class Int8:
    """About a quarter of the bytes: blocks of 256 values, each with a float32 scale of largest magnitude / 127."""

    name = "int8"
    ratio = (BLOCK + 4) / (4 * BLOCK)
    block = BLOCK

    def encoded_bytes(self, size: int) -> int:
        """1 byte a value and 4 bytes a block."""
        return size + 4 * -(-size // BLOCK)

    def encode(self, values: NDArray[np.float32]) -> NDArray[np.uint8]:
        """The scales, then the rounded values."""
        blocks = -(-values.size // BLOCK)
        padded = np.zeros(blocks * BLOCK, np.float32)
        padded[: values.size] = values
        table = padded.reshape(blocks, BLOCK)
        scales = np.maximum(table.max(1), -table.min(1)) / np.float32(127)
        scales = np.where(np.isfinite(scales), scales, np.float32(np.nan))
        table /= np.where(scales > 0, scales, np.float32(1))[:, None]
        out = np.empty(self.encoded_bytes(values.size), np.uint8)
        out[: 4 * blocks] = scales.view(np.uint8)
        np.rint(table, out=table)
        np.clip(np.nan_to_num(table, copy=False), -127, 127, out=table)  # the scale marks a block as not finite
        out[4 * blocks :] = padded[: values.size].astype(np.int8).view(np.uint8)
        return out

    def decode(self, data: bytes | memoryview, size: int) -> NDArray[np.float32]:
        """Value times scale."""
        blocks = -(-size // BLOCK)
        scales = np.frombuffer(data, np.float32, blocks)
        padded = np.zeros(blocks * BLOCK, np.float32)
        padded[:size] = np.frombuffer(data, np.int8, size, 4 * blocks)
        table = padded.reshape(blocks, BLOCK)
        table *= scales[:, None]
        return padded[:size]
