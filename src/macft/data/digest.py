"""Digests of tokenised rows, to find out whether two nodes train on the same ones."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import numpy as np

from macft.data.formats import Row
from macft.data.load import Split
from macft.data.order import RowOrder

GROUP = 1024
"""Rows of one digest of :func:`row_digests`, where that is not said."""
_DIGEST_BYTES = 8
_STEPS = 16
"""Steps whose batches :func:`order_digest` is about; other random values of another NumPy show at once."""


def split_digest(split: Split, *, with_records: bool = False) -> str:
    """Number and digest of a split's rows: their order, tokens and prompt lengths, and how many each source has.

    Args:
        with_records: The records, too, for rows whose answers are judged by fields that are no tokens.
    """
    digest = hashlib.sha256(json.dumps(split.source_sizes).encode())
    for group in row_digests(split.rows):
        digest.update(group)
    for record in split.records if with_records else ():
        digest.update(json.dumps(record, sort_keys=True, default=str).encode())
    return f"{len(split.rows)} rows ({short(digest.digest())})"


def row_digests(rows: Sequence[Row], *, size: int = GROUP) -> list[bytes]:
    """The digest (8 bytes) of each group of ``size`` rows; the last group may have fewer."""
    found = []
    for start in range(0, len(rows), size):
        group = rows[start : start + size]
        digest = hashlib.sha256()
        digest.update(np.array([[len(row.tokens), row.prompt_length] for row in group], np.int64).tobytes())
        digest.update(np.concatenate([row.tokens for row in group]).astype(np.int32, copy=False).tobytes())
        found.append(digest.digest()[:_DIGEST_BYTES])
    return found


def order_digest(order: RowOrder) -> str:
    """Digest of the row numbers in the first batches."""
    numbers = np.concatenate([order.rows(step) for step in range(_STEPS)])
    return short(hashlib.sha256(numbers.astype(np.int64).tobytes()).digest())


def first_different(digests: Sequence[Sequence[bytes]]) -> int:
    """The index of the first group that is not the same in all lists of :func:`row_digests`."""
    shared = min(map(len, digests))
    return next((i for i in range(shared) if len({every[i] for every in digests}) > 1), shared)


def short(digest: bytes) -> str:
    """A digest for a message: 64 bits, which don't agree by chance."""
    return digest[:_DIGEST_BYTES].hex()
