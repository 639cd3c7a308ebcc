"""A thread that reads weights while others compute."""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import cache
from queue import SimpleQueue
from typing import Any, TypeVar

Result = TypeVar("Result")


def in_reading_thread(function: Callable[..., Result], *arguments: Any) -> Future[Result]:
    """Calls ``function`` there, after what was asked for before."""
    future: Future[Result] = Future()
    _queue().put((future, function, arguments))
    return future


@cache
def _queue() -> SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]]:
    """What the thread has to do. There is one for the process, for MLX keeps a stream of each thread that ever was.

    The thread never ends, and is idle when Python does. A thread that has used MLX and ends at that time, as those of a
    ThreadPoolExecutor do, was seen to abort the process: MLX's clean-up of it wants Python's lock, which is gone.
    """
    queue: SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]] = SimpleQueue()
    threading.Thread(target=_serve, args=(queue,), name="weights", daemon=True).start()
    atexit.register(lambda: in_reading_thread(lambda: None).result())
    return queue


def _serve(queue: SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]]) -> None:
    while True:
        future, function, arguments = queue.get()
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)
        del future, function, arguments  # which would hold a block's weights
