"""MLX arrays as the bytes of a message, and back."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from macft.collective.dtypes import flat_view
from macft.errors import ProtocolError

_NUMPY_TYPES = {mx.bfloat16: np.uint16, mx.float16: np.float16, mx.float32: np.float32, mx.int32: np.int32}


def array_bytes(array: mx.array) -> memoryview:
    """The memory of ``array``, of bfloat16, float16 or float32; a copy only where it is not row-contiguous.

    Computes ``array``. The view keeps the memory alive.
    """
    array = mx.contiguous(array)
    mx.eval(array)
    flat, _ = flat_view(array)
    return flat.view(np.uint8).data


def array_of(data: memoryview, shape: Sequence[int], dtype: mx.Dtype) -> mx.array:
    """The array of ``shape`` and ``dtype`` (those above, or int32) whose bytes are ``data``.

    Raises:
        ProtocolError: it has another number of bytes.
    """
    values = np.frombuffer(data, np.uint8)
    expected = int(np.prod(shape)) * dtype.size
    if len(values) != expected:
        raise ProtocolError(f"a message of {len(values)} bytes, and {expected} were due; do all ranks run the same?")
    found = mx.array(values.view(_NUMPY_TYPES[dtype]).reshape(shape))
    return found.view(mx.bfloat16) if dtype == mx.bfloat16 else found


def overwrite(array: mx.array, values: mx.array) -> None:
    """Puts ``values``, of the same shape and type, into the memory of ``array``, which has been computed.

    What MLX computes from ``array`` from now on is computed from ``values``.
    """
    mx.eval(array, values)
    to, _ = flat_view(array)
    np.copyto(to.view(np.uint8), np.frombuffer(array_bytes(values), np.uint8))
