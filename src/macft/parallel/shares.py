"""Who computes which rows of a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from macft.data.batch import in_common


class DataShard(NamedTuple):
    """What decides which rows of a step are a node's; see :func:`assign`."""

    rank: int
    world_size: int
    shares: tuple[float, ...] | None = None


def assign(
    lengths: NDArray[np.int64], world_size: int, shares: Sequence[float] | None = None
) -> list[NDArray[np.int64]]:
    """Row places (0 to len(lengths) - 1) for each rank; every place exactly once, the same answer on every node.

    Longest rows first, each to the rank that would be done with it soonest (longest processing time first, Graham
    1969), where rank r works at speed ``shares[r]`` (equal speeds if None). A rank with a share of 0 gets
    nothing. With at least as many rows as ranks no rank is left idle under equal shares.
    """
    speeds = np.ones(world_size) if shares is None else np.asarray(shares, dtype=np.float64)
    if len(speeds) != world_size or not (np.all(speeds >= 0) and np.all(np.isfinite(speeds)) and np.any(speeds > 0)):
        raise ValueError("there must be one share of 0 or more for each rank, and one above 0")
    working = np.flatnonzero(speeds)
    load = np.zeros(world_size)
    places: list[list[int]] = [[] for _ in range(world_size)]
    for place in sorted(range(len(lengths)), key=lambda i: (-int(lengths[i]), i)):
        rank = int(working[np.argmin((load[working] + lengths[place]) / speeds[working])])
        load[rank] += lengths[place]
        places[rank].append(place)
    return [np.array(sorted(mine), dtype=np.int64) for mine in places]


def rows_of_shard(seat: DataShard, rows: Sequence[NDArray[np.int32]], *, shared: bool) -> NDArray[np.int64]:
    """Which of ``rows`` of tokens the node at ``seat`` computes. ``shared``: rows that begin alike share these tokens.

    What all rows begin with costs a node the same however many of them it has, so it doesn't count.
    """
    common = in_common(*(row[:-1] for row in rows)) if shared and len(rows) else 0
    lengths = np.array([len(row) - common for row in rows], dtype=np.int64)
    return assign(lengths, seat.world_size, seat.shares)[seat.rank]
