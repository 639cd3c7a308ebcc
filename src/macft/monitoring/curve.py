"""A curve of a run of any length, with a limited number of points."""

from __future__ import annotations

from typing import NamedTuple


class Point(NamedTuple):
    """A value at a step; both are means where a point stands for several steps."""

    step: float
    value: float


class Curve:
    """Means over as many steps as keep the number of points below ``most``."""

    def __init__(self, most: int):
        self._most, self._steps_each = most, 1
        self._sums: list[list[float]] = []  # of steps, of values, and their number
        self._last = -1.0

    def add(self, step: float, value: float) -> None:
        """Adds the value of a step; one that is not after the last step is left out."""
        if step <= self._last:
            return
        self._last = step
        if self._sums and self._sums[-1][2] < self._steps_each:
            for place, addend in enumerate((step, value, 1.0)):
                self._sums[-1][place] += addend
            return
        if len(self._sums) == self._most:
            pairs = zip(self._sums[::2], self._sums[1::2], strict=True)
            self._sums = [[one + other for one, other in zip(*pair, strict=True)] for pair in pairs]
            self._steps_each *= 2
        self._sums.append([step, value, 1.0])

    @property
    def points(self) -> list[Point]:
        """In the order of the steps."""
        return [Point(steps / number, values / number) for steps, values, number in self._sums]
