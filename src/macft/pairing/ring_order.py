"""In which order the machines form the ring: neighbours by the fastest links."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

_EXACT_UP_TO = 8


def ring_order(cost: Sequence[Sequence[float]]) -> list[int]:
    """The ring whose slowest link is the fastest, and among those the one with the least sum.

    All nodes pass a piece on at the same time, so the slowest link of a ring sets its pace. Up to eight machines all
    rings are looked at; beyond, one is improved by reversing stretches until none helps.

    Args:
        cost: Seconds to pass a piece between two machines, a symmetric [n, n] matrix.

    Returns:
        The machines in ring order, machine 0 first.
    """
    count = len(cost)
    if count <= 3:
        return list(range(count))
    if count <= _EXACT_UP_TO:
        rings = ([0, *rest] for rest in itertools.permutations(range(1, count)) if rest[0] < rest[-1])
        return min(rings, key=lambda ring: _judge(ring, cost))
    ring = list(range(count))
    while True:
        turned = [
            ring[:first] + ring[first:last][::-1] + ring[last:]
            for first, last in itertools.combinations(range(1, count + 1), 2)
        ]
        best = min(turned, key=lambda candidate: _judge(candidate, cost))
        if _judge(best, cost) >= _judge(ring, cost):
            return ring
        ring = best


def _judge(ring: Sequence[int], cost: Sequence[Sequence[float]]) -> tuple[float, float]:
    steps = [cost[node][ring[(place + 1) % len(ring)]] for place, node in enumerate(ring)]
    return max(steps), sum(steps)
