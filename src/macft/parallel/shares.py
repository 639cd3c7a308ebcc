"""Who computes which rows of a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from macft.data.batch import Batch, common_prefix_length


class DataShard(NamedTuple):
    """A rank's place among all ranks, and their shares: it decides which rows of a step it gets (:func:`assign`)."""

    rank: int
    world_size: int
    shares: tuple[float, ...] | None = None


def assign(
    lengths: NDArray[np.int64], world_size: int, shares: Sequence[float] | None = None
) -> list[NDArray[np.int64]]:
    """Indices of rows for each rank, ascending: each row exactly once, and the same answer on every node.

    Longest rows first, each to the rank that would finish it first (longest processing time first, Graham 1969), where
    rank r works at speed ``shares[r]`` (equal speeds if None). A rank with a share of 0 gets nothing. With at least as
    many rows as ranks every rank gets one under equal shares.

    Args:
        lengths: tokens of each row, (rows,).
        world_size: number of ranks.
        shares: speeds, (world_size,); only their ratios matter.

    Raises:
        ValueError: ``shares`` has another length, a negative or infinite value, or only zeros.
    """
    speeds = np.ones(world_size) if shares is None else np.asarray(shares, dtype=np.float64)
    if len(speeds) != world_size or not (np.all(speeds >= 0) and np.all(np.isfinite(speeds)) and np.any(speeds > 0)):
        raise ValueError("there must be one share of 0 or more for each rank, and one above 0")
    working = np.flatnonzero(speeds)
    tokens = np.zeros(world_size)
    indices: list[list[int]] = [[] for _ in range(world_size)]
    for row in sorted(range(len(lengths)), key=lambda i: (-int(lengths[i]), i)):
        rank = int(working[np.argmin((tokens[working] + lengths[row]) / speeds[working])])
        tokens[rank] += lengths[row]
        indices[rank].append(row)
    return [np.array(sorted(rows), dtype=np.int64) for rows in indices]


def rows_of_shard(shard: DataShard, rows: Sequence[NDArray[np.int32]], *, shared: bool) -> NDArray[np.int64]:
    """Indices (n,) of those of ``rows``, each the tokens (length,) of one row, that ``shard`` computes.

    ``shared``: common beginnings of rows are computed once. What all rows begin with then costs a node the same however
    many of them it has, so it isn't counted.
    """
    common = common_prefix_length(*(row[:-1] for row in rows)) if shared and len(rows) else 0
    lengths = np.array([len(row) - common for row in rows], dtype=np.int64)
    return assign(lengths, shard.world_size, shard.shares)[shard.rank]


def batches_of_shard(shard: DataShard, batches: Sequence[Batch]) -> list[Batch]:
    """Those of ``batches``, all micro-batches of a step, that ``shard`` computes; by tokens, as rows are shared."""
    lengths = np.array([batch.lengths.sum() for batch in batches], dtype=np.int64)
    return [batches[index] for index in assign(lengths, shard.world_size, shard.shares)[shard.rank]]
