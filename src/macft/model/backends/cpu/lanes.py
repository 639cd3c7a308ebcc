"""Parts of a batch side by side, on a thread each that computes its matrix products alone.

Threads that share a product wait for each other some thousand times a step. Beside another busy process one of them is
always late, and the others' waiting, which is busy too, is charged to them: a step was seen to take 15 times as long.
Threads that compute different rows wait once, at the end.

A lane has modules of its own, for a gradient is taken by putting traced values in the place of the parameters. The
arrays in them are the same, so that weights exist once.
"""

from __future__ import annotations

import atexit
import copy
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import cache
from itertools import cycle
from queue import SimpleQueue
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from macft.device import blas
from macft.model.backends.base import Item, Result
from macft.model.parameter_refs import ParameterRefs


class ThreadLanes:
    """See :class:`~macft.model.backends.base.Lanes`.

    Lane 0 is the caller's thread, for what is computed alone; each other lane has a thread of its own.

    Args:
        models: the model, and replicas of it (:func:`replica_of`), one for each thread.
    """

    def __init__(self, models: Sequence[nn.Module]):
        self.models = models
        self._refs = [ParameterRefs(model) for model in models]
        # One thread a replica: what MLX has begun to compute in a thread can't be computed in another one.
        self._threads = [_thread(lane) for lane in range(1, len(models))]
        self._nothing = mx.zeros(())
        mx.eval(self._nothing)

    def map(self, function: Callable[[int, Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        """See :class:`~macft.model.backends.base.Lanes`. A single item has the caller's thread, and all of BLAS."""
        if len(items) < 2:
            yield from (function(0, item) for item in items)
            return
        pending: deque[Future[Result]] = deque()
        self._share_parameters()
        blas.set_threads(1)
        try:
            for item, (lane, thread) in zip(items, cycle(enumerate(self._threads, start=1)), strict=False):
                if len(pending) == len(self._threads):
                    yield pending.popleft().result()  # the one that this thread had before
                pending.append(thread.submit(function, lane, item))
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.exception()  # waits for its end
            blas.set_threads(blas.available_cores())
            self._release_parameters()

    def _share_parameters(self) -> None:
        """Gives the replicas the model's current parameters."""
        values = self._refs[0].get()
        mx.eval(values)
        for model, refs in zip(self.models[1:], self._refs[1:], strict=True):
            refs.put(values)
            if model.training != self.models[0].training:
                model.train(self.models[0].training)

    def _release_parameters(self) -> None:
        """So that an update can take place in the memory of the old parameters."""
        for refs in self._refs[1:]:
            refs.put([self._nothing] * len(refs.names))


class _Thread:
    """A thread that computes what it is given, one after the other, and never ends before the process.

    MLX keeps compiled functions in the thread that called them. A thread that ends frees them, which needs Python's
    interpreter; where that is already closing down, MLX aborts the process. An executor's threads end just then.
    """

    def __init__(self, name: str):
        self._work: SimpleQueue[Callable[[], None]] = SimpleQueue()
        threading.Thread(target=self._run, name=name, daemon=True).start()
        atexit.register(self._wait)

    def submit(self, function: Callable[..., Result], *arguments: Any) -> Future[Result]:
        """Has ``function(*arguments)`` computed; the future gets its result or its error."""
        future: Future[Result] = Future()

        def work() -> None:
            try:
                future.set_result(function(*arguments))
            except BaseException as error:  # raised again where the result is asked for
                future.set_exception(error)

        self._work.put(work)
        return future

    def _run(self) -> None:
        while True:
            self._work.get()()

    def _wait(self) -> None:
        """Until nothing is computed any more: an interrupted step may be, when the process ends."""
        self.submit(lambda: None).result()


@cache
def _thread(lane: int) -> _Thread:
    """The same for every model, for MLX keeps a stream, with a thread of its own, of each thread that ever was."""
    return _Thread(f"lane-{lane}")


def replica_of(model: nn.Module) -> nn.Module:
    """Modules of their own with the very arrays of ``model``, which must not be installed in a backend."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in (module, vars(module)):
            memo |= {id(array): array for _, array in tree_flatten(dict(value)) if isinstance(array, mx.array)}
    mx.eval(list(memo.values()))  # another thread can't compute what this one began
    return copy.deepcopy(model, memo)
