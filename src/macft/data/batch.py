"""Rows of tokens as padded batches, or laid end to end."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

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


def coarse(count: int, least: int = 1) -> int:
    """``count``, 1 or more, rounded up to one of few sizes: multiples of ``least``, four from a power of 2 to the next.

    At most a quarter more, or ``least - 1``.
    """
    step = max(least, (1 << (count - 1).bit_length()) // 8)
    return -(-count // step) * step


def coarse_length(length: int) -> int:
    """The length of a batch for compiled steps whose longest row has ``length`` tokens: 1 more than a coarse size."""
    return 1 + coarse(max(1, length - 1), _LEAST)


def coarse_targets(count: int, positions: int) -> int:
    """How many target positions a compiled step computes for ``count`` among ``positions``: all, half, a quarter ...

    A pack can have more targets than positions, and then it is the double, the fourfold ...
    """
    while positions < count:
        positions *= 2
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
    tokens = np.zeros((len(rows), _width(lengths)), dtype=np.int32)
    for place, row in enumerate(rows):
        tokens[place, : len(row.tokens)] = row.tokens
    prompts = np.array([row.prompt_length for row in rows], dtype=np.int64)
    return Batch(tokens, prompts, lengths, np.asarray(row_ids, dtype=np.int64))


def _width(lengths: NDArray[np.int64]) -> int:
    return 1 + -(-(int(lengths.max()) - 1) // PAD_TO) * PAD_TO


def split_rows(batch: Batch, lanes: int) -> list[Batch]:
    """The rows of ``batch`` in batches to compute at the same time, each as wide as its longest row needs."""
    count = lanes_for(len(batch.lengths), lanes)
    if count == 1:
        return [batch]
    return [
        Batch(
            batch.tokens[part, : _width(batch.lengths[part])],
            batch.prompt_lengths[part],
            batch.lengths[part],
            batch.row_ids[part],
        )
        for part in np.array_split(np.arange(len(batch.lengths)), min(count, len(batch.lengths)))
    ]


def lanes_for(rows: int, lanes: int) -> int:
    """In how many parts at the same time ``rows`` are computed by up to ``lanes`` threads.

    1 where most threads would have no row: all of them then share each matrix product.
    """
    return lanes if 2 * rows > lanes else 1


def micro_batches(rows: Sequence[Row], row_ids: NDArray[np.int64], micro_batch_size: int | None) -> list[Batch]:
    """``rows`` in batches of at most ``micro_batch_size`` (None: all at once), rows of like length together."""
    by_length = sorted(range(len(rows)), key=lambda place: (len(rows[place].tokens), int(row_ids[place])))
    size = micro_batch_size or max(1, len(rows))
    groups = [by_length[start : start + size] for start in range(0, len(by_length), size)]
    return [collate([rows[i] for i in group], np.asarray(row_ids)[group]) for group in groups]


@dataclass(frozen=True)
class Pack:
    """Rows laid end to end without padding, shifted for next-token prediction; a common beginning stands there once.

    ``inputs`` (1, tokens) int32: the rows' tokens but the last of each, and of those that are the same as in the row
    before, up to the first other one, none. ``paths`` (rows, longest) int32: where in ``inputs`` a row's tokens are,
    filled with 0; ``lengths``: how many. ``owners`` and ``depths`` (tokens,) int32: the first row that has the token,
    and the token's place in it. ``positions`` (n,) where in ``inputs`` there is a target, ``targets`` (n,) int32 and
    ``weights`` (n,), 1 or, for filling, 0; ``row_ids`` (rows,).
    """

    inputs: NDArray[np.int32]
    paths: NDArray[np.int32]
    lengths: tuple[int, ...]
    owners: NDArray[np.int32]
    depths: NDArray[np.int32]
    positions: NDArray[np.int32]
    targets: NDArray[np.int32]
    weights: NDArray[np.float32]
    row_ids: NDArray[np.int64]


def pack(batch: Batch, most_tokens: int | None, *, shared: bool, lanes: int = 1) -> list[Pack]:
    """The rows of ``batch`` that have a target in packs.

    A pack has at most ``most_tokens`` tokens (None: no limit), or one row that is longer. ``shared``: rows that begin
    alike are put side by side, and what they have in common is in a pack once; without, the longest rows come first.
    ``lanes``: so many packs are computed at the same time, so there is a multiple of that many, of about equal tokens.
    """
    rows = np.flatnonzero(batch.lengths > np.maximum(batch.prompt_lengths, 1)).tolist()
    inputs = {row: batch.tokens[row, : int(batch.lengths[row]) - 1] for row in rows}
    if shared:
        rows.sort(key=lambda row: inputs[row].astype(">u4").tobytes())
    else:
        rows.sort(key=lambda row: (-len(inputs[row]), row))
    lengths = [len(inputs[row]) for row in rows]
    common = [0, *(in_common(inputs[one], inputs[other]) if shared else 0 for one, other in pairwise(rows))]
    limit = sum(lengths) if most_tokens is None else most_tokens
    starts = _starts(lengths, common, limit)
    if (at_once := lanes_for(len(rows), lanes)) > 1:
        count = -(-len(starts) // at_once) * at_once
        lowest = min(max(lengths), limit)
        fits = bisect_left(range(lowest, limit), True, key=lambda most: len(_starts(lengths, common, most)) <= count)
        starts = _starts(lengths, common, lowest + fits)
    groups = [range(*span) for span in pairwise([*starts, len(rows)])]
    return [
        _lay_out(batch, [(rows[place], common[place] if place > group[0] else 0) for place in group])
        for group in groups
    ]


def _starts(lengths: Sequence[int], common: Sequence[int], most_tokens: int) -> list[int]:
    """Where packs begin, if each takes as many of the rows in a row as it may have tokens.

    ``common``: how many tokens a row has in common with the one before.
    """
    starts: list[int] = []
    tokens = 0
    for place, (length, shared) in enumerate(zip(lengths, common, strict=False)):
        tokens += length - shared
        if not starts or tokens > most_tokens:
            starts.append(place)
            tokens = length
    return starts


def in_common(one: NDArray[np.int32], *others: NDArray[np.int32]) -> int:
    """How many tokens all of them begin with."""
    common = len(one)
    for other in others:
        common = min(common, len(other))
        different = np.flatnonzero(one[:common] != other[:common])
        common = int(different[0]) if len(different) else common
    return common


def _lay_out(batch: Batch, group: list[tuple[int, int]]) -> Pack:
    """Rows with the number of tokens that each has in common with the row before."""
    inputs, owners, depths = [], [], []
    positions, targets = [], []
    lengths = tuple(int(batch.lengths[row]) - 1 for row, _ in group)
    paths = np.zeros((len(group), max(lengths)), np.int32)
    start = 0
    for place, ((row, common), length) in enumerate(zip(group, lengths, strict=True)):
        end = start + length - common
        paths[place, :common] = paths[place - 1, :common]
        paths[place, common:length] = np.arange(start, end)
        inputs.append(batch.tokens[row, common:length])
        owners.append(np.full(end - start, place))
        depths.append(np.arange(common, length))
        first = max(int(batch.prompt_lengths[row]), 1)
        positions.append(paths[place, first - 1 : length])
        targets.append(batch.tokens[row, first : length + 1])
        start = end
    where = np.concatenate(positions)
    return Pack(
        inputs=np.concatenate(inputs)[None],
        paths=paths,
        lengths=lengths,
        owners=np.concatenate(owners).astype(np.int32),
        depths=np.concatenate(depths).astype(np.int32),
        positions=where,
        targets=np.concatenate(targets),
        weights=np.ones(len(where), np.float32),
        row_ids=batch.row_ids[[row for row, _ in group]],
    )


def widened_pack(item: Pack) -> Pack:
    """``item`` with filling, so that what is compiled for one pack serves many."""

    def filled(values: Any, *sizes: int) -> Any:
        return np.pad(values, [(0, size - old) for size, old in zip(sizes, values.shape, strict=True)])

    tokens = coarse(item.inputs.shape[1], _LEAST)
    targets = coarse_targets(len(item.positions), tokens)
    # Attention is the smaller part, so that few shapes are worth more here than little filling.
    rows, longest = coarse(len(item.lengths)), max(_LEAST, 1 << (item.paths.shape[1] - 1).bit_length())
    return replace(
        item,
        inputs=filled(item.inputs, 1, tokens),
        paths=filled(item.paths, rows, longest),
        owners=filled(item.owners, tokens),
        depths=filled(item.depths, tokens),
        positions=filled(item.positions, targets),
        targets=filled(item.targets, targets),
        weights=filled(item.weights, targets),
        row_ids=filled(item.row_ids, rows),
    )
