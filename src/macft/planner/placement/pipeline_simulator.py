"""A pipeline step, pass by pass: what the formula of :func:`~macft.planner.placement.cluster_model.clock_of` predicts.

Each stage does one thing at a time, in the order of a run (:mod:`macft.training.gradients.pipeline_schedule`), with the
most micro-batches in flight. A stage that has no backward pass runs ahead. A link carries one message at a time in each
direction, beside the computation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from macft.planner.placement.cluster_model import StageCost
from macft.training.gradients.pipeline_schedule import in_flight, one_forward_one_backward


@dataclass(frozen=True)
class Interval:
    """Stage ``stage`` computed micro-batch ``number`` from ``start`` to ``end``, forward or backward."""

    stage: int
    forward: bool
    number: int
    start: float
    end: float


@dataclass(frozen=True)
class SimulatedStep:
    """A step of ``seconds``; ``intervals`` of a stage are in the order of time."""

    seconds: float
    intervals: tuple[Interval, ...]

    def busy(self, stage: int) -> float:
        """Seconds in which ``stage`` computed."""
        return sum(each.end - each.start for each in self.intervals if each.stage == stage)

    def in_flight(self, stage: int) -> int:
        """Most micro-batches at once for which ``stage`` had gone forward and not yet back."""
        held = most = 0
        for each in self.intervals:
            if each.stage == stage:
                held += 1 if each.forward else -1
                most = max(most, held)
        return most


def simulate(stages: Sequence[StageCost], micro_batches: int) -> SimulatedStep:
    """A step of ``micro_batches`` from the first forward to the last backward pass."""
    count = len(stages)
    orders = [
        list(one_forward_one_backward(in_flight(count - place)[1], micro_batches, backward=stage.bound))
        for place, stage in enumerate(stages)
    ]
    # When the input of a pass is there: hidden states from the stage before, gradients from the one behind.
    ready = {(0, True, number): 0.0 for number in range(micro_batches)}
    free, done = [0.0] * count, [0] * count
    link_free: dict[tuple[int, bool], float] = {}
    intervals: list[Interval] = []
    waiting = {0}
    while waiting:
        place = waiting.pop()
        while done[place] < len(orders[place]):
            number, forward = orders[place][done[place]]
            if (place, forward, number) not in ready:
                break
            start = max(free[place], ready[place, forward, number])
            end = start + (stages[place].forward if forward else stages[place].backward)
            intervals.append(Interval(place, forward, number, start, end))
            free[place] = end
            done[place] += 1
            to = place + 1 if forward else place - 1
            if forward and to == count:
                ready[place, False, number] = end
            elif to >= 0 and (forward or stages[to].bound):
                sent = max(end, link_free.get((place, forward), 0.0)) + stages[min(place, to)].wire
                link_free[place, forward] = ready[to, forward, number] = sent
                waiting.add(to)
    assert done == [len(order) for order in orders]
    return SimulatedStep(max(free), tuple(intervals))
