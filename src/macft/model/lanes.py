"""Graphs computed side by side on the cores of a CPU.

MLX's CPU backend runs one operation after the other; only matrix products, through BLAS, use more than one core. Rows
are independent, so each core takes some of them through the whole model instead: a lane is a thread with an MLX
stream of its own, and BLAS uses one thread in each. On a GPU there is one lane, the caller's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, TypeVar

import mlx.core as mx

from macft import blas
from macft.model.device import on_cpu

Item = TypeVar("Item")
Result = TypeVar("Result")

_MOST_LANES = 8
"""Every lane holds the activations of its rows."""

_own = threading.local()
_building = threading.Lock()


def lane_count() -> int:
    """Lanes worth having on this process's cores; 1 where MLX's products don't go through a BLAS macft controls."""
    return min(_MOST_LANES, blas.available_cores()) if on_cpu() and blas.is_loaded() else 1


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_MOST_LANES, thread_name_prefix="lane")


def side_by_side(lanes: Sequence[Item], compute: Callable[[Item, threading.Lock], Result]) -> list[Result]:
    """``compute(item, lock)`` of each item in a lane of its own; one item is computed by the caller.

    ``compute`` has to hold ``lock`` while it builds a graph, for tracing changes the model, and to evaluate what it
    returns, for an MLX stream can't be used from another thread.
    """
    if len(lanes) == 1:
        return [compute(lanes[0], _building)]
    blas.set_threads(1)
    try:
        return list(_pool().map(lambda item: _in_own_stream(item, compute), lanes))
    finally:
        blas.set_threads(blas.available_cores())


def _in_own_stream(item: Item, compute: Callable[[Item, threading.Lock], Result]) -> Result:
    stream: Any = getattr(_own, "stream", None)
    if stream is None:
        stream = _own.stream = mx.new_stream(mx.default_device())
    with mx.stream(stream):
        return compute(item, _building)
