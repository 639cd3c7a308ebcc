"""The memory that an all-reduce sums in place: arrays as flat buffers, small ones joined, and their pieces."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from macft.collective.base import ReducibleArray
from macft.collective.dtypes import FlatArray, flat_view

FUSE_BELOW = 65_536
"""Arrays of fewer bytes are concatenated and summed as one."""


@dataclass(frozen=True)
class Buffer:
    """Memory to sum in place: a flat array and its dtype on the wire (see :mod:`~macft.collective.dtypes`)."""

    flat: FlatArray
    dtype: str


class FusedCopies(NamedTuple):
    """A buffer that holds copies of several small arrays, and these arrays."""

    fused: Buffer
    arrays: list[FlatArray]


def fuse(arrays: Sequence[ReducibleArray]) -> tuple[list[Buffer], list[FusedCopies]]:
    """The buffers to sum in place of ``arrays``, and those of them that hold copies of several small arrays.

    Raises:
        ValueError: an array that cannot be summed; names its index.
    """
    buffers: list[Buffer] = []
    small: dict[str, list[FlatArray]] = {}
    for number, array in enumerate(arrays):
        try:
            flat, dtype = flat_view(array)
        except (ValueError, TypeError) as error:
            kinds = "float32, float64, float16 or bfloat16"
            raise ValueError(
                f"all_reduce sums C-contiguous, writable {kinds} arrays; array {number} is {error}"
            ) from None
        if flat.nbytes >= FUSE_BELOW:
            buffers.append(Buffer(flat, dtype))
        elif flat.size:
            small.setdefault(dtype, []).append(flat)
    copies = []
    for dtype in sorted(small):
        flats = small[dtype]
        fused = Buffer(flats[0] if len(flats) == 1 else np.concatenate(flats), dtype)
        buffers.append(fused)
        if len(flats) > 1:
            copies.append(FusedCopies(fused, flats))
    return buffers, copies


def unfuse(copies: Sequence[FusedCopies]) -> None:
    """Copies the sums back into the small arrays."""
    for fused, arrays in copies:
        start = 0
        for flat in arrays:
            flat[:] = fused.flat[start : start + flat.size]
            start += flat.size


def chunk_of(size: int, chunk: int, chunks: int) -> tuple[int, int]:
    """Where one of ``chunks`` equal parts of ``size`` elements begins and ends."""
    return size * chunk // chunks, size * (chunk + 1) // chunks


def slices_of(flat: FlatArray, chunk: int, chunks: int, piece_bytes: int, *, multiple: int = 1) -> Iterator[slice]:
    """Where the pieces of at most ``piece_bytes`` are that make up one of ``chunks`` equal parts of ``flat``.

    All pieces but the last have a multiple of ``multiple`` elements.
    """
    begin, end = chunk_of(flat.size, chunk, chunks)
    step = piece_bytes // flat.itemsize // multiple * multiple
    for start in range(begin, end, step):
        yield slice(start, min(start + step, end))


def pieces_of(buffers: Sequence[Buffer], chunk: int, chunks: int, piece_bytes: int) -> Iterator[Buffer]:
    """The pieces of that part of each buffer, one after the other."""
    for buffer in buffers:
        for piece in slices_of(buffer.flat, chunk, chunks, piece_bytes):
            yield Buffer(buffer.flat[piece], buffer.dtype)


def layout_of(buffers: Sequence[Buffer]) -> int:
    """A checksum of sizes and dtypes. It detects calls of equal size with different arrays, which would sum wrongly."""
    return _checksum(tuple([(buffer.dtype, buffer.flat.size) for buffer in buffers]))


@lru_cache
def _checksum(layout: tuple[tuple[str, int], ...]) -> int:
    return zlib.crc32(",".join(f"{dtype}{size}" for dtype, size in layout).encode())
