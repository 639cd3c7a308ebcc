"""Rows of tokens as padded batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from macft.data.formats import Row

PAD_TO = 16
"""Batch lengths are 1 more than a multiple of this, so that few shapes occur; the 1 is the last target."""


@dataclass(frozen=True)
class Batch:
    """``tokens`` (rows, length) int32, padded with 0 at the end; the rest (rows,).

    Targets of a row are its tokens from place ``max(prompt_length, 1)`` up to its length. (mlx-lm also trains on the
    padding token after each row, by an off-by-one in its mask; macft does not.)
    """

    tokens: NDArray[np.int32]
    prompt_lengths: NDArray[np.int64]
    lengths: NDArray[np.int64]
    row_ids: NDArray[np.int64]


def collate(rows: Sequence[Row], row_ids: NDArray[np.int64]) -> Batch:
    """One batch of ``rows``, whose numbers in the dataset are ``row_ids``."""
    lengths = np.array([len(row.tokens) for row in rows], dtype=np.int64)
    width = 1 + -(-(int(lengths.max()) - 1) // PAD_TO) * PAD_TO
    tokens = np.zeros((len(rows), width), dtype=np.int32)
    for place, row in enumerate(rows):
        tokens[place, : len(row.tokens)] = row.tokens
    prompts = np.array([row.prompt_length for row in rows], dtype=np.int64)
    return Batch(tokens, prompts, lengths, np.asarray(row_ids, dtype=np.int64))


def micro_batches(rows: Sequence[Row], row_ids: NDArray[np.int64], micro_batch_size: int | None) -> list[Batch]:
    """``rows`` in batches of at most ``micro_batch_size`` (None: all at once), rows of like length together."""
    by_length = sorted(range(len(rows)), key=lambda place: (len(rows[place].tokens), int(row_ids[place])))
    size = micro_batch_size or max(1, len(rows))
    groups = [by_length[start : start + size] for start in range(0, len(by_length), size)]
    return [collate([rows[i] for i in group], np.asarray(row_ids)[group]) for group in groups]
