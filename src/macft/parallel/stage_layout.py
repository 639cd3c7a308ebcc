"""Which rank holds and computes which blocks of the model: pipelines of stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """A rank's blocks, numbered as in the whole model: from ``first`` up to, and without, ``end``."""

    rank: int
    first: int
    end: int

    @property
    def blocks(self) -> range:
        """The numbers of its blocks."""
        return range(self.first, self.end)


@dataclass(frozen=True)
class StageLayout:
    """One or more pipelines. Each holds the whole model, cut into stages in the order of the blocks.

    Rows are dealt to pipelines; all rows of a pipeline go through all of its stages. With one stage in each pipeline it
    is data parallelism. A rank that is in no pipeline computes nothing.

    Raises:
        ValueError: a pipeline's stages do not follow each other from block 0 to the last one, or a rank is used twice.
    """

    pipelines: tuple[tuple[Stage, ...], ...]

    def __post_init__(self) -> None:
        ranks = [stage.rank for pipeline in self.pipelines for stage in pipeline]
        if not ranks or len(set(ranks)) != len(ranks):
            raise ValueError("every rank is used once, and there is one")
        for pipeline in self.pipelines:
            borders = [0, *(stage.end for stage in pipeline)]
            if [stage.first for stage in pipeline] != borders[:-1] or any(not stage.blocks for stage in pipeline):
                raise ValueError("stages follow each other from block 0 on, and each has a block")
        if len({pipeline[-1].end for pipeline in self.pipelines}) != 1:
            raise ValueError("all pipelines have the same number of blocks")

    @property
    def blocks(self) -> int:
        """Number of blocks of the model."""
        return self.pipelines[0][-1].end

    @property
    def has_stages(self) -> bool:
        """Whether a pipeline has more than one stage."""
        return any(len(pipeline) > 1 for pipeline in self.pipelines)

    def place_of(self, rank: int) -> tuple[int, int] | None:
        """The pipeline of ``rank`` and its stage there; None if it computes nothing."""
        for number, pipeline in enumerate(self.pipelines):
            for stage, each in enumerate(pipeline):
                if each.rank == rank:
                    return number, stage
        return None

    def blocks_of(self, rank: int) -> range:
        """The blocks of ``rank``; none if it computes nothing."""
        place = self.place_of(rank)
        return range(0) if place is None else self.pipelines[place[0]][place[1]].blocks

    def __str__(self) -> str:
        """One line: ``rank 0: blocks 0-11 > rank 1: blocks 12-23``; pipelines are separated by ``|``."""
        return " | ".join(
            " > ".join(f"rank {stage.rank}: blocks {stage.first}-{stage.end - 1}" for stage in pipeline)
            for pipeline in self.pipelines
        )

    def described(self, world_size: int) -> str:
        """The line, and which of ``world_size`` ranks have no stage."""
        spare = [rank for rank in range(world_size) if self.place_of(rank) is None]
        if not spare:
            return str(self)
        return f"{self}; rank{'s' if len(spare) > 1 else ''} {', '.join(map(str, spare))} without a stage"

    def to_data(self) -> list[list[list[int]]]:
        """Plain lists, for a message or a file; :meth:`from_data` makes them a layout again."""
        return [[[stage.rank, stage.first, stage.end] for stage in pipeline] for pipeline in self.pipelines]

    @classmethod
    def from_data(cls, data: Sequence[Sequence[Sequence[int]]]) -> StageLayout:
        """The layout of :meth:`to_data`. Raises ValueError as the class does."""
        return cls(tuple(tuple(Stage(*numbers) for numbers in pipeline) for pipeline in data))


def spread(numbers: Sequence[int], count: int) -> list[int]:
    """``count`` of ``numbers``, as far apart as can be."""
    count = min(count, len(numbers))
    return [numbers[(2 * place + 1) * len(numbers) // (2 * count)] for place in range(count)]


def even_layout(blocks: int, ranks: Sequence[int], pipelines: int = 1) -> StageLayout:
    """``ranks`` in ``pipelines`` equal groups of neighbours, each of which divides the blocks evenly.

    The first stages get the blocks that are left over.

    Raises:
        ValueError: there are more stages than blocks, or the groups are not equal.
    """
    count = len(ranks) // max(1, pipelines)
    if count == 0 or count * pipelines != len(ranks):
        raise ValueError(f"{len(ranks)} ranks can't form {pipelines} equal pipelines")
    if count > blocks:
        raise ValueError(f"{count} stages are more than the model's {blocks} blocks")
    sizes = [blocks // count + (place < blocks % count) for place in range(count)]
    ends = [sum(sizes[:place]) for place in range(count + 1)]
    return StageLayout(
        tuple(
            tuple(Stage(ranks[group * count + place], ends[place], ends[place + 1]) for place in range(count))
            for group in range(pipelines)
        )
    )


def balanced_layout(costs: Sequence[float], ranks: Sequence[int], most: int) -> StageLayout:
    """One pipeline of ``ranks`` whose most expensive stage is as cheap as can be, and the others about as expensive.

    Args:
        costs: of each block; what comes with the last block, such as the head, is added to its cost.
        ranks: of the stages, in their order; not more than there are blocks.
        most: blocks that a stage may have; more if they would not be enough.
    """
    count, stages = len(costs), len(ranks)
    most = max(most, -(-count // stages))
    before = [0.0]
    for cost in costs:
        before.append(before[-1] + cost)
    # By number of blocks: the most expensive stage, the sum of squares, and where the last of the stages so far begins.
    found: list[dict[int, tuple[float, float, int]]] = [{0: (0.0, 0.0, 0)}]
    for stage in range(1, stages + 1):
        best: dict[int, tuple[float, float, int]] = {}
        for end in range(stage, count - (stages - stage) + 1):
            for first in range(end - 1, max(end - most, stage - 1) - 1, -1):
                if first not in found[-1]:
                    continue
                cost, (largest, squares, _) = before[end] - before[first], found[-1][first]
                candidate = (max(largest, cost), squares + cost**2, first)
                if end not in best or candidate[:2] < best[end][:2]:
                    best[end] = candidate
        found.append(best)
    ends = [count]
    for best in reversed(found[1:]):
        ends.append(best[ends[-1]][2])
    ends.reverse()
    return StageLayout((tuple(Stage(rank, *ends[place : place + 2]) for place, rank in enumerate(ranks)),))
