"""The pipelines that a configuration asks for, whose nodes are taken to be alike."""

from __future__ import annotations

import math
from collections.abc import Sequence

from macft.errors import ConfigError
from macft.model.shape import ModelShape
from macft.parallel.stage_layout import Stage, StageLayout, balanced_layout
from macft.topology.settings import TopologyConfig

_MOST_BLOCKS = 1.5
"""Blocks of a stage at most, as a multiple of an even share: blocks that cost little time need memory too."""


def block_costs(shape: ModelShape, first_trained: int, *, keeps: bool) -> tuple[float, ...]:
    """What each block costs a pipeline, in forward passes of a block; the head is counted with the last one.

    A trained block has a backward pass too, and unless ``keeps`` a second forward pass. Half of the tokens are taken to
    have a target. The same on all nodes.
    """
    trained = 2.0 if keeps else 3.0
    passes = [1.0 if number < first_trained else trained for number in range(shape.blocks)]
    mean = shape.block_parameters
    costs = [count * active / mean for count, active in zip(passes, shape.active_parameters, strict=True)]
    costs[-1] += shape.embedding_parameters / mean
    return tuple(costs)


def decide_layout(topology: TopologyConfig, costs: Sequence[float], world_size: int) -> StageLayout:
    """Which of ``world_size`` ranks computes which of the model's blocks, whose ``costs`` are given.

    As ``topology`` wants it, where it fits the number of ranks: that may have changed since the start. Otherwise nodes
    are taken to be alike. A pure function.
    """
    sizes = pipeline_sizes(topology.pipelines, world_size)
    counts = topology.stages if isinstance(topology.stages, list) and len(topology.stages) == world_size else None
    made: list[tuple[Stage, ...]] = []
    rank = 0
    for size in sizes:
        if counts is None:
            stages = min(size, len(costs))  # the other ranks have nothing to do
            most = math.ceil(_MOST_BLOCKS * len(costs) / stages)
            made += balanced_layout(costs, range(rank, rank + stages), most).pipelines
        else:
            ends = [sum(counts[rank:each]) for each in range(rank, rank + size + 1)]
            made.append(tuple(Stage(rank + place, ends[place], ends[place + 1]) for place in range(size)))
        rank += size
    return StageLayout(tuple(made))


def pipeline_sizes(pipelines: int, world_size: int) -> list[int]:
    """Ranks of each of ``pipelines``, fewer where ``world_size`` ranks are not two for each."""
    count = max(1, min(pipelines, world_size // 2))
    return [world_size // count + (place < world_size % count) for place in range(count)]


def check_layout(topology: TopologyConfig, blocks: int, world_size: int) -> None:
    """Raises ConfigError where the model can't be cut as ``topology`` wants at the start; in one line."""
    stages = -(-world_size // topology.pipelines)
    if stages > blocks:
        pipelines = -(-world_size // blocks)
        several = f"topology.pipelines={pipelines}, " if 2 * pipelines <= world_size else ""
        raise ConfigError(
            f"topology.placement: pipelines of {stages} stages are more than the model's {blocks} blocks allow; use "
            f"{several}fewer nodes, or topology.placement=replicate"
        )
    if not isinstance(topology.stages, list) or len(topology.stages) != world_size:
        return
    for start in range(0, world_size, stages):
        counts = topology.stages[start : start + stages]
        if sum(counts) != blocks:
            raise ConfigError(f"topology.stages: {counts} are {sum(counts)} blocks, and the model has {blocks}")
