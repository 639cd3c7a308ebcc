"""The dtypes that an all-reduce sums, and views of MLX arrays as NumPy memory without a copy."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import mlx.core as mx

BFLOAT16 = "bf16"
"""The name on the wire of a dtype that NumPy does not have; such arrays are held as their uint16 bits."""
WIRE_TYPES = ("<f2", "<f4", "<f8", BFLOAT16)

FlatArray: TypeAlias = NDArray[np.generic]
"""A one-dimensional, writable array of one of ``WIRE_TYPES``."""


def flat_view(array: NDArray[np.generic] | mx.array) -> tuple[FlatArray, str]:
    """The memory of a NumPy or evaluated MLX array as a flat writable NumPy array, and its dtype on the wire.

    Nothing is copied: both share the memory. An MLX array shares it through the buffer protocol; bfloat16 is seen as
    uint16 bits.

    Raises:
        ValueError: the array is not C-contiguous, not writable, or of a dtype that cannot be summed.
    """
    if isinstance(array, np.ndarray):
        flat: FlatArray = array
        dtype = array.dtype.str
    else:
        exporter = cast(bytes, array)  # MLX's type stubs do not declare the buffer protocol
        memory = memoryview(exporter)
        if not memory.c_contiguous:
            raise ValueError("an MLX array that is not row-contiguous (mx.contiguous makes one)")
        dtype = BFLOAT16 if memory.format == "bfloat16" else np.dtype(memory.format).str
        flat = np.frombuffer(exporter, np.uint16 if dtype == BFLOAT16 else np.dtype(dtype))
    if dtype not in WIRE_TYPES or not (flat.flags.c_contiguous and flat.flags.writeable):
        raise ValueError(f"{dtype}, contiguous: {flat.flags.c_contiguous}, writable: {flat.flags.writeable}")
    return flat.reshape(-1), dtype


def add(out: FlatArray, first: FlatArray, second: FlatArray, dtype: str) -> None:
    """``out[:] = first + second`` for flat arrays of wire dtype ``dtype``; ``out`` may be one of the operands.

    bfloat16 is added in float32 and rounded to even.
    """
    if dtype == BFLOAT16:
        out[:] = to_bfloat16(from_bfloat16(first.view(np.uint16)) + from_bfloat16(second.view(np.uint16)))
    else:
        np.add(first, second, out=out)


def from_bfloat16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The float32 values of bfloat16 bits, same shape; exact."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The bfloat16 bits of float32 values, same shape, rounded to nearest, ties to even; NaN stays NaN."""
    bits = values.view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)
    rounded[np.isnan(values)] = 0x7FC0
    return rounded
