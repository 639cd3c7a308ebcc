"""The order of the machines in the ring: neighbours have the fastest links."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

_EXACT_UP_TO = 8


def ring_order(cost: Sequence[Sequence[float]]) -> list[int]:
    """The ring whose slowest link is the fastest; of several such rings, the one with the smallest sum.

    All nodes send at the same time, so the slowest link limits the ring. For up to eight machines all rings are
    compared. For more, a ring is improved by reversing segments (2-opt) until that no longer helps.

    Args:
        cost: Seconds to send a piece between two machines, a symmetric [n, n] matrix.

    Returns:
        The machines in ring order, machine 0 first.
    """
    count = len(cost)
    if count <= 3:
        return list(range(count))
    if count <= _EXACT_UP_TO:
        rings = ([0, *rest] for rest in itertools.permutations(range(1, count)) if rest[0] < rest[-1])
        return min(rings, key=lambda ring: _ring_cost(ring, cost))
    ring = list(range(count))
    while True:
        candidates = [
            ring[:first] + ring[first:last][::-1] + ring[last:]
            for first, last in itertools.combinations(range(1, count + 1), 2)
        ]
        best = min(candidates, key=lambda candidate: _ring_cost(candidate, cost))
        if _ring_cost(best, cost) >= _ring_cost(ring, cost):
            return ring
        ring = best


def _ring_cost(ring: Sequence[int], cost: Sequence[Sequence[float]]) -> tuple[float, float]:
    links = [cost[node][ring[(index + 1) % len(ring)]] for index, node in enumerate(ring)]
    return max(links), sum(links)
