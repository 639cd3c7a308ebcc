"""The number types that an all-reduce sums, and how MLX arrays are seen without a copy."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

BFLOAT16 = "bf16"
"""The wire's name of a type that NumPy does not have; such arrays are held as their uint16 bits."""
WIRE_TYPES = ("<f2", "<f4", "<f8", BFLOAT16)


def view(array: Any) -> tuple[NDArray[Any], str]:
    """The memory of a NumPy or evaluated MLX array as a flat writable NumPy array, and its type on the wire.

    Nothing is copied: a change of one is a change of the other. An MLX array shares its memory through the buffer
    protocol; bfloat16 comes as uint16 bits.

    Raises:
        ValueError: not a C-contiguous, writable array of a type that can be summed.
    """
    if isinstance(array, np.ndarray):
        found, dtype = array, array.dtype.str
    else:
        memory = memoryview(array)
        if not memory.c_contiguous:
            raise ValueError("an MLX array that is not row-contiguous (mx.contiguous makes one)")
        dtype = BFLOAT16 if memory.format == "bfloat16" else np.dtype(memory.format).str
        found = np.frombuffer(array, np.uint16 if dtype == BFLOAT16 else np.dtype(dtype))
    if dtype not in WIRE_TYPES or not (found.flags.c_contiguous and found.flags.writeable):
        raise ValueError(f"{dtype}, contiguous: {found.flags.c_contiguous}, writable: {found.flags.writeable}")
    return found.reshape(-1), dtype


def add(into: NDArray[Any], first: NDArray[Any], second: NDArray[Any], dtype: str) -> None:
    """``into[:] = first + second``, in the type the wire calls ``dtype``; ``into`` may be one of them.

    bfloat16 is added in float32 and rounded to even.
    """
    if dtype == BFLOAT16:
        into[:] = to_bfloat16(from_bfloat16(first) + from_bfloat16(second))
    else:
        np.add(first, second, out=into)


def from_bfloat16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """float32 values of bfloat16 bits; exact."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """bfloat16 bits of float32 values, rounded to nearest, ties to even; NaN stays NaN."""
    bits = values.view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)
    rounded[np.isnan(values)] = 0x7FC0
    return rounded
