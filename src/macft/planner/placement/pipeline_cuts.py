"""The cuts of a model into stages with the least sum of stage times, for a longest time of a stage.

Stages, and the memory that they take, depend on how many stages follow. So a pipeline is built from its end: for each
group of nodes and each block, the smallest sum with which this group computes all blocks from that one on. It is a
dynamic programme over groups; to bound the slowest stage is the idea of PipeDream (Narayanan et al. 2019,
arXiv:1806.03377). Nodes that are alike are of one kind, and groups are made of kinds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np

from macft.planner.placement.stage_costs import Table

Group: TypeAlias = tuple[int, ...]
"""The kinds of the nodes of a pipeline: in the order of the stages, or sorted where every order is possible."""


class KindStage(NamedTuple):
    """A stage of some node of ``kind``: the blocks from ``first`` up to, and without, ``end``."""

    kind: int
    first: int
    end: int


class Cuts:
    """Cuts for ``groups``. ``any_order``: they are sorted, and their nodes may follow each other in every order.

    ``seconds``: of a kind, as a stage that is the n-th from the end, the seconds of each range of blocks.
    """

    def __init__(self, groups: Sequence[Group], blocks: int, seconds: Callable[[int, int], Table], *, any_order: bool):
        self._blocks, self._seconds, self._any_order = blocks, seconds, any_order
        needed: set[Group] = set()
        waiting = [group for group in groups if len(group) <= blocks]
        while waiting:
            group = waiting.pop()
            if group and group not in needed:
                needed.add(group)
                waiting += [rest for _, rest in self._first_and_rest(group)]
        self._groups = sorted(needed, key=lambda group: (len(group), group))
        self._kinds = sorted({(kind, len(group)) for group in needed for kind, _ in self._first_and_rest(group)})

    def _first_and_rest(self, group: Group) -> list[tuple[int, Group]]:
        if not self._any_order:
            return [(group[0], group[1:])]
        places = {kind: place for place, kind in enumerate(group)}
        return [(kind, group[:place] + group[place + 1 :]) for kind, place in places.items()]

    def values(self) -> np.ndarray:
        """All times that a stage can take, ascending."""
        tables = [self._seconds(kind, count) for kind, count in self._kinds]
        return np.unique(np.concatenate([table[np.isfinite(table)] for table in tables])) if tables else np.zeros(0)

    def shortest(self, values: np.ndarray) -> int:
        """The place of the smallest of ``values`` that allows a pipeline of several stages; their number if none."""
        low, high = 0, len(values)
        while low < high:
            middle = (low + high) // 2
            if next(self.layouts(values[middle]), None) is not None:
                high = middle
            else:
                low = middle + 1
        return low

    def layouts(self, longest: float) -> Iterator[tuple[KindStage, ...]]:
        """Of each group of two or more nodes, the cut with the least sum whose stages take at most ``longest``."""
        none = np.full(self._blocks + 1, np.inf)
        end = none.copy()
        end[self._blocks] = 0.0
        sums: dict[Group, np.ndarray] = {(): end}
        # Of each group and block: the kind of the node that computes it first, and where its range ends.
        steps: dict[Group, tuple[np.ndarray, np.ndarray]] = {}
        limited = {}
        for kind, count in self._kinds:
            seconds = self._seconds(kind, count)
            limited[kind, count] = np.where(seconds <= longest * (1 + 1e-12), seconds, np.inf)
        rows = np.arange(self._blocks + 1)
        for group in self._groups:
            best, kinds, ends = none, np.zeros(0), np.zeros(0)
            for kind, rest in self._first_and_rest(group):
                if rest not in sums:
                    continue
                through = limited[kind, len(group)] + sums[rest]
                found = through.argmin(axis=1)
                total = through[rows, found]
                if best is none:
                    best, kinds, ends = total, np.full(len(rows), kind), found
                else:
                    better = total < best
                    best[better], kinds[better], ends[better] = total[better], kind, found[better]
            if np.isfinite(best.min()):
                sums[group], steps[group] = best, (kinds, ends)
                if len(group) > 1 and math.isfinite(best[0]):
                    yield self._trace(group, steps)

    def _trace(self, group: Group, steps: dict[Group, tuple[np.ndarray, np.ndarray]]) -> tuple[KindStage, ...]:
        stages, first = [], 0
        while group:
            kinds, ends = steps[group]
            stages.append(KindStage(int(kinds[first]), first, int(ends[first])))
            group = dict(self._first_and_rest(group))[stages[-1].kind]
            first = stages[-1].end
        return tuple(stages)
