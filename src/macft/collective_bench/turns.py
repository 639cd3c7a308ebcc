"""Measures several implementations in turns, so that a change of the machine's speed affects all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from macft.collective_bench.measured_group import GroupFailed, MeasuredGroup

_TURN_SECONDS = 0.03
_MAX_CALLS = 40
_WARM_CALLS = 3


@dataclass
class Measured:
    """The all-reduces of one size by one implementation.

    Attributes:
        name: The implementation.
        size: Bytes of the array.
        ranks: The number of ranks.
        calls: Seconds of each call on the slowest rank.
        turns: The median of each turn. The turns of all implementations have the same order.
        failure: Why the implementation failed, if it did.
    """

    name: str
    size: int
    ranks: int
    calls: list[float] = field(default_factory=list)
    turns: list[float] = field(default_factory=list)
    failure: str = ""

    @property
    def median(self) -> float:
        """The median call in seconds; NaN if nothing was measured."""
        return float(np.median(self.calls)) if self.calls else float("nan")

    @property
    def p95(self) -> float:
        """The 95th percentile in seconds; NaN if nothing was measured."""
        return float(np.percentile(self.calls, 95)) if self.calls else float("nan")

    @property
    def algorithm_bandwidth(self) -> float:
        """Bytes of the array a second."""
        return self.size / self.median

    @property
    def bus_bandwidth(self) -> float:
        """Bytes a second on each link: 2(n-1)/n of the algorithm bandwidth, as in nccl-tests."""
        return self.algorithm_bandwidth * 2 * (self.ranks - 1) / self.ranks

    def add_turn(self, seconds: Sequence[float]) -> None:
        """Adds the calls of one turn."""
        self.calls += seconds
        self.turns.append(float(np.median(seconds)))

    def ratio_to(self, other: Measured) -> float:
        """How many times as long this one takes: the median over the turns that both have completed."""
        pairs = list(zip(self.turns, other.turns, strict=False))
        return float(np.median([mine / theirs for mine, theirs in pairs])) if pairs else float("nan")


def measure(
    groups: Sequence[MeasuredGroup], sizes: Sequence[int], turns: int, on_result: Callable[[list[Measured]], None]
) -> list[list[Measured]]:
    """Times all groups at all ``sizes`` (bytes, multiples of 4); ``on_result`` is called with the results of each size.

    A group that fails or hangs is not measured any more; its ``failure`` says why.
    """
    failures: dict[str, str] = {}
    results = []
    for size in sizes:
        row = [Measured(group.name, size, group.ranks, failure=failures.get(group.name, "")) for group in groups]
        calls = [0] * len(groups)
        for turn in range(turns + 1):
            for index, (group, result) in enumerate(zip(groups, row, strict=True)):
                if result.failure:
                    continue
                try:
                    if turn == 0:
                        calls[index] = _warm_up(group, size)
                    else:
                        result.add_turn(_times(group, calls[index]))
                except GroupFailed as error:
                    result.failure = failures[group.name] = str(error)
        on_result(row)
        results.append(row)
    return results


def _warm_up(group: MeasuredGroup, size: int) -> int:
    """Checks one sum; returns the number of calls of a turn."""
    group.order(size=size)
    expected = group.ranks * (group.ranks + 1) / 2
    sums = [answer["sum"] for answer in group.order(check=True)]
    if any(total != expected for total in sums):
        group.close()
        raise GroupFailed(f"{group.name}: wrong sum at {size} bytes: {sums}, not {expected}")
    seconds = float(np.median(_times(group, _WARM_CALLS)))
    return calls_in_a_turn(seconds)


def calls_in_a_turn(seconds: float) -> int:
    """The number of calls of a turn, if each takes ``seconds``: enough to measure, few enough to alternate often."""
    return max(1, min(_MAX_CALLS, round(_TURN_SECONDS / max(seconds, 1e-6))))


def _times(group: MeasuredGroup, calls: int) -> list[float]:
    answers = group.order(calls=calls)
    return [float(value) for value in np.max([answer["seconds"] for answer in answers], axis=0)]
