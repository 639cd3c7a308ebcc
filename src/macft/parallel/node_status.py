"""What every node tells the others with each step: how fast it was, how hot it is, and how much it may do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

REASONS = ("", "temperature", "thermal state", "power", "battery", "on battery", "quiet hours")
"""Why a node may do less than all."""


@dataclass(frozen=True)
class NodeStatus:
    """One node's step: ``tokens`` in ``busy_seconds`` of computing, rests left out; None is unknown.

    ``duty`` is the part of the time the node may compute, ``paused`` says that it wants no rows at all. Temperature in
    C, ``state`` 0 to 4, watts now and at most, ``joules`` since the first step of this process, metered over
    ``metered_seconds``; ``estimated`` marks power that comes from a model. ``messages``: number of lines that the node
    has for the others. Of the busy seconds ``disk_seconds`` were spent waiting for weights that are read from disk, and
    ``wait_seconds`` for another stage of a pipeline; in ``wire_seconds`` of them hidden states were being sent.
    ``peak_memory``: bytes that MLX has held at once, at most.
    """

    tokens: int = 0
    busy_seconds: float = 0.0
    duty: float = 1.0
    paused: bool = False
    reason: str = ""
    temperature: float | None = None
    state: int | None = None
    watts: float | None = None
    peak_watts: float | None = None
    joules: float | None = None
    metered_seconds: float = 0.0
    estimated: bool = False
    # In metrics.jsonl it keeps the name that readers of the file know.
    messages: int = field(default=0, metadata={"recorded_as": "remarks"})

    disk_seconds: float | None = None
    wait_seconds: float | None = None
    wire_seconds: float | None = None
    peak_memory: int | None = None

    SIZE = 17

    def numbers(self) -> NDArray[np.float64]:
        """The status as float64, (SIZE,); NaN for None."""
        values = [
            self.tokens,
            self.busy_seconds,
            self.duty,
            self.paused,
            REASONS.index(self.reason),
            self.temperature,
            self.state,
            self.watts,
            self.peak_watts,
            self.joules,
            self.metered_seconds,
            self.estimated,
            self.messages,
            self.disk_seconds,
            self.wait_seconds,
            self.wire_seconds,
            self.peak_memory,
        ]
        return np.array([math.nan if value is None else float(value) for value in values], dtype=np.float64)

    @classmethod
    def of_numbers(cls, numbers: Sequence[float]) -> NodeStatus:
        """The inverse of :meth:`numbers`."""
        values = [None if math.isnan(number) else float(number) for number in numbers]
        state, peak_memory = values[6], values[16]
        return cls(
            tokens=int(values[0] or 0),
            busy_seconds=values[1] or 0.0,
            duty=1.0 if values[2] is None else values[2],
            paused=bool(values[3]),
            reason=REASONS[int(values[4] or 0)],
            temperature=values[5],
            state=None if state is None else int(state),
            watts=values[7],
            peak_watts=values[8],
            joules=values[9],
            metered_seconds=values[10] or 0.0,
            estimated=bool(values[11]),
            messages=int(values[12] or 0),
            disk_seconds=values[13],
            wait_seconds=values[14],
            wire_seconds=values[15],
            peak_memory=None if peak_memory is None else int(peak_memory),
        )
