"""Measures a collective that this process is already part of: one rank of several machines."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence

import numpy as np

from macft.collective.base import Collective
from macft.collective_bench.sides import Side
from macft.collective_bench.turns import Measured, calls_in_a_turn

_WARM_CALLS = 3


def measure_here(
    sides: dict[str, Side],
    collective: Collective,
    sizes: Sequence[int],
    turns: int,
    tell: Callable[[list[Measured]], None],
) -> list[list[Measured]]:
    """Times all ``sides`` by turns at all ``sizes`` (bytes, multiples of 4); all ranks get the same results.

    ``collective`` serves to agree on the number of calls and to gather the times.
    """
    found = []
    for size in sizes:
        row = [Measured(name, size, collective.world_size) for name in sides]
        calls = []
        for side in sides.values():
            side.prepare(size)
            side.clear()
            calls.append(calls_in_a_turn(float(np.median(_times(side, collective, _WARM_CALLS)))))
        for _ in range(turns):
            for side, result, count in zip(sides.values(), row, calls, strict=True):
                result.add_turn(_times(side, collective, count))
        tell(row)
        found.append(row)
    return found


def _times(side: Side, collective: Collective, calls: int) -> list[float]:
    """Seconds of each call on the slowest rank; equal on all ranks, so that all decide alike."""
    side.barrier()
    seconds = []
    for _ in range(calls):
        started = time.perf_counter()
        side.reduce()
        seconds.append(time.perf_counter() - started)
    everyone = [json.loads(blob) for blob in collective.all_gather(json.dumps(seconds).encode())]
    return [float(value) for value in np.max(everyone, axis=0)]
