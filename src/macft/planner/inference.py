"""How a machine holds a model that only answers or is evaluated: all of it, or as many blocks as there is room for."""

from __future__ import annotations

import math
from collections.abc import Collection
from itertools import accumulate

from macft.model.blocks.ends import BOTH_ENDS
from macft.model.execution import Execution
from macft.model.shape import ModelShape
from macft.planner.whole_model import resident_blocks

WEIGHTS_ONLY = 0.8
"""Of a machine's memory, what the weights of a model that only answers may take."""


def inference_placement(
    execution: Execution, shape: ModelShape | None, budget: float, wanted: str, resident: int | str
) -> Execution:
    """How a machine that may take ``budget`` bytes holds a model that only answers or is evaluated."""
    if shape is None:
        return execution.streamed(()) if wanted == "stream" else execution
    if wanted == "replicate" or (wanted == "auto" and shape.weight_bytes(execution.weight_format) <= budget):
        return execution
    room = blocks_with_room(shape, execution, budget)
    count = shape.blocks if room >= shape.blocks else max(0, room - 2)
    if not isinstance(resident, str):
        count = resident
    return execution.streamed(resident_blocks(shape.blocks, shape.blocks, min(count, shape.blocks)))


def blocks_with_room(shape: ModelShape, execution: Execution, budget: float, ends: Collection[str] = BOTH_ENDS) -> int:
    """Of a model that only answers, the blocks that fit ``budget`` bytes beside ``ends`` of it.

    There may be more than the model has; below 0, not even what is around them fits. A fifth is left for activations
    and a cache of keys and values.
    """
    weights = execution.weight_format
    free, sizes = WEIGHTS_ONLY * budget - shape.outside_bytes(weights, ends), shape.block_bytes(weights)
    if free < 0 or free >= sum(sizes):
        return math.floor(free / (sum(sizes) / len(sizes)))
    # Blocks that follow each other, wherever they begin.
    before = [0.0, *accumulate(sizes)]
    fitting = (
        count
        for count in range(len(sizes), 0, -1)
        if all(end - start <= free for start, end in zip(before, before[count:], strict=False))
    )
    return next(fitting, 0)
