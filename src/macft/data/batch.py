"""Rows of tokens as padded batches, or laid end to end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

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


_LEAST = 32


def coarse_length(length: int) -> int:
    """The length of a batch for compiled steps whose longest row has ``length`` tokens.

    One of few, 1 more than a multiple of 32 and at most a quarter longer: four from a power of two to the next.
    """
    step = max(_LEAST, (1 << max(length - 2, 0).bit_length()) // 8)
    return 1 + max(1, -(-(length - 1) // step)) * step


def coarse_targets(count: int, positions: int) -> int:
    """How many target positions a compiled step computes for ``count`` among ``positions``: all, half, a quarter ..."""
    while positions // 2 >= max(count, _LEAST):
        positions //= 2
    return positions


def widened(batch: Batch) -> Batch:
    """``batch`` padded to one of few lengths, so that what is compiled for one batch serves many."""
    more = coarse_length(int(batch.lengths.max())) - batch.tokens.shape[1]
    return replace(batch, tokens=np.pad(batch.tokens, ((0, 0), (0, more))))


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


@dataclass(frozen=True)
class Pack:
    """Rows laid end to end without padding, shifted for next-token prediction.

    ``inputs`` (1, tokens) int32, the rows' tokens but the last of each; ``lengths``, how many of them each row has;
    ``positions`` (n,) where in ``inputs`` there is a target, ``targets`` (n,) int32, ``weights`` (n,) all 1;
    ``row_ids`` (rows,).
    """

    inputs: NDArray[np.int32]
    lengths: tuple[int, ...]
    positions: NDArray[np.int32]
    targets: NDArray[np.int32]
    weights: NDArray[np.float32]
    row_ids: NDArray[np.int64]


def pack(batch: Batch, most_tokens: int | None) -> list[Pack]:
    """The rows of ``batch`` that have a target, longest first, in packs.

    A pack has at most ``most_tokens`` tokens (None: no limit), or one row that is longer. Which rows go where depends
    on their lengths only.
    """
    has_target = batch.lengths > np.maximum(batch.prompt_lengths, 1)
    rows = sorted(np.flatnonzero(has_target).tolist(), key=lambda row: (-int(batch.lengths[row]), row))
    return [_lay_out(batch, group) for group in _cut(batch, rows, most_tokens)]


def _cut(batch: Batch, rows: list[int], most_tokens: int | None) -> list[list[int]]:
    groups: list[list[int]] = [[]] if rows else []
    tokens = 0
    for row in rows:
        length = int(batch.lengths[row])
        if groups[-1] and most_tokens is not None and tokens + length > most_tokens:
            groups.append([])
            tokens = 0
        groups[-1].append(row)
        tokens += length
    return groups


def _lay_out(batch: Batch, rows: list[int]) -> Pack:
    lengths = tuple(int(batch.lengths[row]) - 1 for row in rows)
    inputs = np.concatenate([batch.tokens[row, :length] for row, length in zip(rows, lengths, strict=True)])
    following = np.concatenate([batch.tokens[row, 1 : length + 1] for row, length in zip(rows, lengths, strict=True)])
    is_target = np.concatenate(
        [
            np.arange(1, length + 1) >= max(int(batch.prompt_lengths[row]), 1)
            for row, length in zip(rows, lengths, strict=True)
        ]
    )
    positions = np.flatnonzero(is_target).astype(np.int32)
    weights = np.ones(len(positions), dtype=np.float32)
    return Pack(inputs[None], lengths, positions, following[positions], weights, batch.row_ids[rows])
