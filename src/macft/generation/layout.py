"""Which rank of a cluster that answers holds which blocks."""

from __future__ import annotations

from collections.abc import Sequence

from macft.parallel.stage_layout import Stage, StageLayout, even_layout


def answering_layout(blocks: int, room: Sequence[int], leader: int) -> StageLayout:
    """One pipeline of all ranks that begins with ``leader``: even, but for ranks without ``room`` for so many blocks.

    Blocks for which no rank has room are spread evenly again; a rank reads from disk what doesn't fit its memory.

    Args:
        blocks: Of the model.
        room: By rank, the blocks that fit its memory.
        leader: The rank of the first stage.

    Raises:
        ValueError: there are more ranks than blocks.
    """
    order = [(leader + distance) % len(room) for distance in range(len(room))]
    even = even_layout(blocks, order)
    sizes = [len(stage.blocks) for stage in even.pipelines[0]]
    most = [max(1, room[rank]) for rank in order]
    if sum(most) < blocks:
        return even
    left = sum(max(0, size - limit) for size, limit in zip(sizes, most, strict=True))
    sizes = [min(size, limit) for size, limit in zip(sizes, most, strict=True)]
    while left:
        place = max(range(len(sizes)), key=lambda place: most[place] - sizes[place])
        sizes[place] += 1
        left -= 1
    ends = [sum(sizes[: place + 1]) for place in range(len(sizes))]
    stages = [Stage(rank, end - size, end) for rank, size, end in zip(order, sizes, ends, strict=True)]
    return StageLayout((tuple(stages),))
