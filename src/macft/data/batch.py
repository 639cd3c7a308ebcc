"""Rows of tokens as padded batches, or packed end to end.

Shapes: R rows, L the length of the longest row after padding, T tokens of a pack, N target positions of a pack.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from macft.data.formats import Row

_Scalar = TypeVar("_Scalar", bound=np.generic)

PAD_TO = 16
"""Batch lengths are 1 more than a multiple of this, to limit the number of shapes; the 1 is the last target."""
_MIN_LENGTH = 32
"""Lengths for compiled steps are multiples of this."""
_PACK_MULTIPLE = 64
"""Tokens of packs for compiled steps are multiples of this: a tile of a GPU's matrix product has that many rows."""
_SHORT_PACK = 512
"""Up to this many tokens, rows in a pack have no size of their own: tokens attend under a mask there."""
_LEAST_TARGETS = 96
_HALVES = range(192, 640)
"""Where half of the positions would be so many targets, all are computed: that half is not worth a shape of its own."""


@dataclass(frozen=True)
class Batch:
    """Padded rows.

    The targets of a row are its tokens from index ``max(prompt_length, 1)`` to its length. (mlx-lm also trains on the
    padding token after each row, because of an off-by-one in its mask; macft does not.)

    Attributes:
        tokens: (R, L) int32, padded with 0 at the end.
        prompt_lengths: (R,) int64, leading tokens that are not targets.
        lengths: (R,) int64, tokens without padding.
        row_ids: (R,) int64, the rows' numbers in the dataset.
    """

    tokens: NDArray[np.int32]
    prompt_lengths: NDArray[np.int64]
    lengths: NDArray[np.int64]
    row_ids: NDArray[np.int64]


def coarse(count: int, multiple: int = 1) -> int:
    """``count``, 1 or more, rounded up to one of few sizes: multiples of ``multiple``, four per power of 2.

    The result is larger by at most a quarter, or by ``multiple - 1``.
    """
    step = max(multiple, (1 << (count - 1).bit_length()) // 8)
    return -(-count // step) * step


def coarse_length(length: int) -> int:
    """L for compiled steps where the longest row has ``length`` tokens: 1 more than a coarse size."""
    return 1 + coarse(max(1, length - 1), _MIN_LENGTH)


def coarse_targets(count: int, positions: int) -> int:
    """Number of target positions that a compiled step computes for ``count`` targets in ``positions`` positions.

    It is ``positions`` times a power of 2: 1, a half, a quarter ..., 96 or more if there are so many. A pack can have
    more targets than positions; then it is 2, 4 ...
    """
    while positions < count:
        positions *= 2
    targets = positions
    while targets // 2 >= max(count, _LEAST_TARGETS):
        targets //= 2
    return positions if targets == positions // 2 and targets in _HALVES else targets


def pad_to_bucket(batch: Batch) -> Batch:
    """``batch`` padded to one of few lengths, so that a compiled step is used for many batches."""
    more = coarse_length(int(batch.lengths.max())) - batch.tokens.shape[1]
    return replace(batch, tokens=np.pad(batch.tokens, ((0, 0), (0, more))))


def collate(rows: Sequence[Row], row_ids: NDArray[np.int64]) -> Batch:
    """One batch of ``rows``; ``row_ids`` (R,) are their numbers in the dataset."""
    lengths = np.array([len(row.tokens) for row in rows], dtype=np.int64)
    tokens = np.zeros((len(rows), _width(lengths)), dtype=np.int32)
    for index, row in enumerate(rows):
        tokens[index, : len(row.tokens)] = row.tokens
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
    """``rows`` in batches of at most ``micro_batch_size`` rows (None: one batch), sorted by length."""
    by_length = sorted(range(len(rows)), key=lambda index: (len(rows[index].tokens), int(row_ids[index])))
    size = micro_batch_size or max(1, len(rows))
    groups = [by_length[start : start + size] for start in range(0, len(by_length), size)]
    return [collate([rows[i] for i in group], np.asarray(row_ids)[group]) for group in groups]


@dataclass(frozen=True)
class Pack:
    """Rows packed end to end without padding, as inputs and targets; a common prefix of neighbours is stored once.

    Attributes:
        inputs: (1, T) int32, each row's tokens except its last one, and except the prefix that it shares with the row
            before.
        paths: (R, L) int32, indices into ``inputs`` of each row's tokens, padded with 0.
        lengths: R numbers of tokens, those of ``paths`` that are not padding.
        owners: (T,) int32, the first row that has the token.
        depths: (T,) int32, the token's index in that row.
        positions: (N,) int32, indices into ``inputs`` that have a target.
        targets: (N,) int32, the tokens to predict.
        weights: (N,) float32, 1, or 0 for padding.
        row_ids: (R,) int64, the rows' numbers in the dataset.
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
    """The rows of ``batch`` that have a target, in packs.

    Args:
        most_tokens: Largest T, None for no limit; a row that is longer gets a pack of its own.
        shared: Rows are sorted so that common prefixes are neighbours, and a pack stores each prefix once. Otherwise
            the longest rows come first and nothing is shared.
        lanes: So many packs are computed at the same time: the number of packs is a multiple of it, and they have about
            equal numbers of tokens.
    """
    rows = np.flatnonzero(batch.lengths > np.maximum(batch.prompt_lengths, 1)).tolist()
    inputs = {row: batch.tokens[row, : int(batch.lengths[row]) - 1] for row in rows}
    if shared:
        rows.sort(key=lambda row: inputs[row].astype(">u4").tobytes())
    else:
        rows.sort(key=lambda row: (-len(inputs[row]), row))
    lengths = [len(inputs[row]) for row in rows]
    common = [0, *(common_prefix_length(inputs[one], inputs[other]) if shared else 0 for one, other in pairwise(rows))]
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


def common_prefix_length(one: NDArray[np.int32], *others: NDArray[np.int32]) -> int:
    """Length of the prefix that all of the token rows, each (L,), have in common."""
    common = len(one)
    for other in others:
        common = min(common, len(other))
        different = np.flatnonzero(one[:common] != other[:common])
        common = int(different[0]) if len(different) else common
    return common


def _lay_out(batch: Batch, group: list[tuple[int, int]]) -> Pack:
    """The pack of ``group``: pairs of a row's index and the length of the prefix it shares with the row before."""
    inputs, owners, depths = [], [], []
    positions, targets = [], []
    lengths = tuple(int(batch.lengths[row]) - 1 for row, _ in group)
    paths = np.zeros((len(group), max(lengths)), np.int32)
    start = 0
    for index, ((row, common), length) in enumerate(zip(group, lengths, strict=True)):
        end = start + length - common
        paths[index, :common] = paths[index - 1, :common]
        paths[index, common:length] = np.arange(start, end)
        inputs.append(batch.tokens[row, common:length])
        owners.append(np.full(end - start, index))
        depths.append(np.arange(common, length))
        first = max(int(batch.prompt_lengths[row]), 1)
        positions.append(paths[index, first - 1 : length])
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


def pad_pack_to_bucket(item: Pack) -> Pack:
    """``item`` padded to one of few sizes, so that a compiled step is used for many packs."""

    def padded(values: NDArray[_Scalar], *sizes: int) -> NDArray[_Scalar]:
        return np.pad(values, [(0, size - old) for size, old in zip(sizes, values.shape, strict=True)])

    tokens = coarse(item.inputs.shape[1], _PACK_MULTIPLE)
    targets = coarse_targets(len(item.positions), tokens)
    # Attention is the smaller part of a step, so fewer shapes matter more here than less padding.
    longest = max(item.paths.shape[1], min(tokens, _SHORT_PACK))
    rows, longest = coarse(len(item.lengths)), 1 << (longest - 1).bit_length()
    return replace(
        item,
        inputs=padded(item.inputs, 1, tokens),
        paths=padded(item.paths, rows, longest),
        owners=padded(item.owners, tokens),
        depths=padded(item.depths, tokens),
        positions=padded(item.positions, targets),
        targets=padded(item.targets, targets),
        weights=padded(item.weights, targets),
        row_ids=padded(item.row_ids, rows),
    )
