"""In which order a stage of a pipeline computes its micro-batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from macft.model.execution import Execution


class Pass(NamedTuple):
    """The forward pass of a micro-batch, or its backward pass."""

    micro_batch: int
    is_forward: bool


def in_flight(from_end: int) -> tuple[int, int]:
    """The fewest and the most micro-batches that a stage holds at once; ``from_end`` stages are left, its own included.

    With the fewest, those of 1F1B, no stage waits for another one's computation. But a stage that has sent its result
    waits until the answer has come, so that the time on the network adds to each micro-batch. With one more for each
    link there and back a stage computes meanwhile.
    """
    return from_end, 2 * from_end - 1


class Holding(NamedTuple):
    """``micro_batches`` that a stage holds at once; whether it ``keeps`` what their backward passes need."""

    micro_batches: int
    keeps: bool


def holding(execution: Execution, from_end: int, trained: int, *, can_keep: bool) -> Holding:
    """What a stage holds that ``from_end - 1`` others follow, with ``trained`` blocks that have a backward pass.

    As many micro-batches as there is room for, of those that :func:`in_flight` allows. Without room for the activations
    of the fewest, or without ``can_keep``, hidden states at the borders of blocks are held and blocks computed again.
    """
    fewest, most = in_flight(from_end)
    keeps = can_keep and trained * fewest <= execution.activation_capacity
    room = execution.activation_capacity // max(1, trained) if keeps else execution.border_capacity // (trained + 1)
    return Holding(max(fewest, min(most, room)), keeps)


def one_forward_one_backward(held: int, micro_batches: int, *, backward: bool = True) -> Iterator[Pass]:
    """The passes of a stage in their order: 1F1B (PipeDream-Flush, Narayanan et al. 2021, arXiv:2006.09503).

    The stage runs ahead until it holds ``held`` micro-batches (see :func:`in_flight`), then backward and forward passes
    take turns. With p equal stages and m micro-batches each is idle for ``(p - 1) / (m + p - 1)`` of the time. Backward
    passes come in the order of the micro-batches, whatever ``held`` is.

    ``backward``: whether the stage has backward passes; one whose blocks lie below the first trained one has none.
    """
    if not backward:
        yield from (Pass(number, True) for number in range(micro_batches))
        return
    ahead = min(held - 1, micro_batches)
    yield from (Pass(number, True) for number in range(ahead))
    for number in range(ahead, micro_batches):
        yield Pass(number, True)
        yield Pass(number - ahead, False)
    yield from (Pass(number, False) for number in range(micro_batches - ahead, micro_batches))
