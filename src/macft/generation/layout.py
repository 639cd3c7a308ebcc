"""Which rank of a cluster that answers holds which blocks."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from macft.parallel.stage_layout import Stage, StageLayout

# Cuts whose times differ by less are equally fast; the one with the most even stages is taken.
_ALIKE = 1e-3


@dataclass(frozen=True)
class AnsweringNode:
    """What a rank needs for a token. A weight is read once for each token, from memory or from disk.

    Attributes:
        room: Of the model's blocks, those that fit its memory; two, at least, to read others from disk.
        block: Seconds for a block in memory.
        read: Seconds to read a block from disk.
        head: Seconds for the head.
    """

    room: int
    block: float
    read: float
    head: float = 0.0

    def seconds(self, count: int, *, is_last: bool) -> float:
        """For a stage of ``count`` blocks, with the head if it ``is_last``; infinite if it doesn't fit."""
        if self.room < min(count, 2):
            return math.inf
        resident = blocks_in_memory(count, self.room)
        head = self.head if is_last else 0.0
        return resident * self.block + (count - resident) * max(self.block, self.read) + head


def blocks_in_memory(count: int, room: int) -> int:
    """Of a stage of ``count`` blocks on a rank with ``room``, those that stay in memory: two take turns if any does."""
    return count if count <= room else max(0, room - 2)


def answering_layout(nodes: Sequence[AnsweringNode], blocks: int, leader: int, together: int) -> StageLayout | None:
    """One pipeline of all ranks that begins with ``leader``, with the shortest time for a token of every answer.

    An answer's token goes through all stages, one after the other. Of several answers each stage computes one after the
    other. So ``n`` answers get a token each in the sum of the stages' times, or ``n`` times that of the slowest stage,
    whatever is longer.

    Args:
        nodes: By rank.
        blocks: Of the model, at least as many as there are ranks.
        leader: The rank of the first stage.
        together: Most answers that are computed at the same time.

    Returns:
        None if the blocks fit in no cut.
    """
    order = [(leader + distance) % len(nodes) for distance in range(len(nodes))]
    tables = [
        [nodes[rank].seconds(count, is_last=rank == order[-1]) for count in range(1, blocks - len(order) + 2)]
        for rank in order
    ]
    limits = sorted({seconds for table in tables for seconds in table if math.isfinite(seconds)})
    cuts: dict[int, tuple[float, list[int]]] = {}

    def cut(place: int) -> tuple[float, list[int]]:
        if place not in cuts:
            cuts[place] = _shortest_sum(tables, blocks, limits[place])
        return cuts[place]

    def first(is_enough: Callable[[int], bool]) -> int:
        return bisect_left(range(len(limits)), True, key=is_enough)

    # A higher limit makes the sum shorter, and the slowest stage slower.
    met = first(lambda place: cut(place)[0] <= together * limits[place])
    best = min(
        (max(cut(place)[0], together * limits[place]) for place in (met - 1, met) if 0 <= place < len(limits)),
        default=math.inf,
    )
    if math.isinf(best):
        return None
    sizes = cut(first(lambda place: cut(place)[0] <= best * (1 + _ALIKE)))[1]
    ends = [sum(sizes[: place + 1]) for place in range(len(sizes))]
    stages = [Stage(rank, end - size, end) for rank, size, end in zip(order, sizes, ends, strict=True)]
    return StageLayout((tuple(stages),))


def _shortest_sum(tables: Sequence[Sequence[float]], blocks: int, limit: float) -> tuple[float, list[int]]:
    """The sum of the stages' times, and their blocks, where no stage takes longer than ``limit``.

    ``tables``: of each stage, the time of 1, 2 ... blocks. Of equal sums it is the one with the most even times.
    """
    # By number of blocks, for the stages from the one at hand on: the value that is minimised, the sum, and the blocks.
    found: dict[int, tuple[float, float, list[int]]] = {0: (0.0, 0.0, [])}
    for table in reversed(tables):
        reached: dict[int, tuple[float, float, list[int]]] = {}
        for count, seconds in reversed(list(enumerate(table, 1))):
            if seconds > limit:
                continue
            value = seconds + _ALIKE / 10 * seconds * seconds / limit
            for rest, (others, total, sizes) in found.items():
                number = count + rest
                if number <= blocks and (number not in reached or (value + others) < reached[number][0] * (1 - 1e-9)):
                    reached[number] = value + others, seconds + total, [count, *sizes]
        found = reached
    _, total, sizes = found.get(blocks, (0.0, math.inf, []))
    return total, sizes
