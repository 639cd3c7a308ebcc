"""Trees of arrays as safetensors in memory, and back."""

from __future__ import annotations

import io

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from macft.model.files.weight_files import parse_header

# NumPy has no bfloat16: its bits are taken over as they are.
_DTYPES = {
    "BOOL": (np.bool_, mx.bool_),
    "U8": (np.uint8, mx.uint8),
    "U16": (np.uint16, mx.uint16),
    "U32": (np.uint32, mx.uint32),
    "U64": (np.uint64, mx.uint64),
    "I8": (np.int8, mx.int8),
    "I16": (np.int16, mx.int16),
    "I32": (np.int32, mx.int32),
    "I64": (np.int64, mx.int64),
    "F16": (np.float16, mx.float16),
    "BF16": (np.uint16, mx.bfloat16),
    "F32": (np.float32, mx.float32),
    "F64": (np.float64, mx.float64),
    "C64": (np.complex64, mx.complex64),
}


def pack_tensors(tree: object) -> bytes:
    """A tree of arrays as safetensors, sorted by name."""
    buffer = io.BytesIO()
    mx.save_safetensors(buffer, dict(sorted(tree_flatten(tree))))
    return buffer.getvalue()


def unpack_tensors(data: bytes) -> dict[str, mx.array]:
    """The inverse of :func:`pack_tensors`: arrays by dotted name, which are evaluated.

    ``mx.load`` is not used: it reads a Python file object in a thread of MLX's own, which may let go of the object only
    when Python is closing down already, and then aborts the process.

    Raises:
        ValueError: ``data`` is not a safetensors file with the types that MLX has.
    """
    header, start = parse_header(io.BytesIO(data))
    arrays = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            stored, dtype = _DTYPES[entry["dtype"]]
            first, last = entry["data_offsets"]
            values = np.frombuffer(memoryview(data)[start + first : start + last], stored).reshape(entry["shape"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"{name}: not the description of a tensor") from error
        array = mx.array(values, dtype if dtype == mx.float64 else None)
        arrays[name] = array.view(dtype) if array.dtype != dtype else array
    mx.eval(arrays)
    return arrays
