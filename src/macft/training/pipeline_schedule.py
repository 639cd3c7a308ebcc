"""In which order a stage of a pipeline computes its micro-batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple


class Pass(NamedTuple):
    """The forward pass of a micro-batch, or its backward pass."""

    micro_batch: int
    is_forward: bool


def one_forward_one_backward(stage: int, stages: int, micro_batches: int, *, backward: bool = True) -> Iterator[Pass]:
    """The passes of ``stage`` in their order: 1F1B (PipeDream-Flush, Narayanan et al. 2021, arXiv:2006.09503).

    Each stage runs ahead by as many micro-batches as there are stages behind it, then forward and backward passes take
    turns. So it holds the hidden states of ``stages - stage`` micro-batches at most, and the last stages are idle for
    ``(stages - 1) / (micro_batches + stages - 1)`` of the time. Backward passes come in the order of the micro-batches.

    ``backward``: whether the stage has backward passes; one whose blocks lie below the first trained one has none.
    """
    if not backward:
        yield from (Pass(number, True) for number in range(micro_batches))
        return
    ahead = min(stages - stage - 1, micro_batches)
    yield from (Pass(number, True) for number in range(ahead))
    for number in range(ahead, micro_batches):
        yield Pass(number, True)
        yield Pass(number - ahead, False)
    yield from (Pass(number, False) for number in range(micro_batches - ahead, micro_batches))
