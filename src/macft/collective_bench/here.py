"""Measures collectives that this process has joined, as one of the ranks on several machines."""

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
    on_result: Callable[[list[Measured]], None],
) -> list[list[Measured]]:
    """Times all ``sides`` in turns at all ``sizes``. All ranks get the same results.

    Args:
        sides: The implementations, by name.
        collective: Used to agree on the number of calls and to gather the times.
        sizes: Bytes, multiples of 4.
        turns: Turns at each size.
        on_result: Called with the results of each size.

    Returns:
        For each size, the results of all sides.
    """
    results = []
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
        on_result(row)
        results.append(row)
    return results


def _times(side: Side, collective: Collective, calls: int) -> list[float]:
    """Seconds of each call on the slowest rank. The result is the same on all ranks, so all make the same calls."""
    side.barrier()
    seconds = []
    for _ in range(calls):
        started = time.perf_counter()
        side.reduce()
        seconds.append(time.perf_counter() - started)
    by_rank = [json.loads(blob) for blob in collective.all_gather(json.dumps(seconds).encode())]
    return [float(value) for value in np.max(by_rank, axis=0)]
