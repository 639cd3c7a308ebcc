"""The collective over MLX's own communication, ``mx.distributed``: its ring, JACCL, NCCL or MPI.

MLX's calls cannot be interrupted and may never return: its ring can hang (mlx issue 4475), and it waits for a silent
neighbour forever. So they run in a thread, while the calling thread checks the health of the other ranks and gives up
for a known reason.
"""

from __future__ import annotations

import atexit
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from types import TracebackType
from typing import NamedTuple, NoReturn, Self, TypeVar, cast

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from macft.collective.base import Channels, ReducibleArray, RingSpeed
from macft.collective.codecs.quantization import WireCodec
from macft.collective.dtypes import BFLOAT16, FlatArray, flat_view
from macft.collective.mlx.group_watch import GroupFailure, GroupWatch
from macft.collective.mlx.health import Health, HealthServer
from macft.collective.settings import CollectiveConfig
from macft.collective.wire import MAX_BLOB_BYTES
from macft.errors import CollectiveError, PeerLost, PeerStopped

BLOCK_BYTES = 16 * 1024 * 1024
"""Most bytes of one MLX operation, so that one which takes ``collective.timeout`` is known to hang."""
_POLL_SECONDS = 0.5
_LINGER_SECONDS = 3.0
"""How long a rank that gives up keeps reporting the reason to the others."""
_log = logging.getLogger("macft.ring")
_T = TypeVar("_T")


class _Outcome(NamedTuple):
    """The result of one call in MLX's thread, or its exception."""

    value: object
    error: Exception | None


class _Request(NamedTuple):
    call: Callable[[], object]
    outcome: queue.SimpleQueue[_Outcome]


class MlxCollective:
    """The :class:`~macft.collective.base.Collective` of an ``mx.distributed`` group.

    A process can be in only one such group, because MLX keeps it until the process ends. float64 arrays, which MLX's
    communication does not support, are gathered and added up in the order of the ranks.

    Args:
        initialize: Joins MLX's group; called in the thread that makes all later calls.
        health: What ``server`` reports; the collective updates it.
        server: This rank's health server, which the collective then owns.
        health_addresses: Addresses of all ranks' health servers, by rank. None: gathered once the group exists.
        settings: Its timeouts.
        names: Host names by rank, for messages.
        secret: Known to the ranks of this run only.

    Raises:
        CollectiveError: the group did not form.
    """

    def __init__(
        self,
        initialize: Callable[[], mx.distributed.Group],
        health: Health,
        server: HealthServer,
        health_addresses: Sequence[str] | None,
        settings: CollectiveConfig,
        *,
        names: Sequence[str] = (),
        secret: str = "",
    ):
        self._health, self._server = health, server
        self._watch = GroupWatch(health, health_addresses or [], settings, names, secret)
        self._began = time.monotonic()
        self._calls = self._bytes_sent = 0
        self._failure: CollectiveError | None = None
        self._closed = False
        self._requests: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        self._group: mx.distributed.Group | None = None
        self._thread = threading.Thread(target=self._work, name="mlx-collective", daemon=True)
        self._thread.start()
        self._stream = mx.gpu if settings.mlx_backend == "nccl" else mx.cpu
        try:
            group = self._group = self._call_mlx("joining MLX's group", initialize)
            self.rank, self.world_size = int(group.rank()), int(group.size())
            self._health.rank = self.rank
            if not health_addresses:
                self._watch.addresses = [blob.decode() for blob in self.all_gather(self._server.address.encode())]
        except BaseException:
            self.close()
            raise
        _log.info("joined MLX's group (%s): rank %d of %d", settings.mlx_backend, self.rank, self.world_size)

    rank: int = 0
    world_size: int = 1

    def all_reduce(self, arrays: Sequence[ReducibleArray]) -> None:
        """Sums each array over all ranks, in place; see :meth:`~macft.collective.ring.ring.Ring.all_reduce`.

        Different sizes on different ranks are not detected: MLX then returns wrong sums, or hangs.
        """
        by_type: dict[str, list[FlatArray]] = {}
        for number, array in enumerate(arrays):
            try:
                flat, dtype = flat_view(array)
            except (ValueError, TypeError) as error:
                raise ValueError(f"all_reduce: array {number} is {error}") from None
            by_type.setdefault(dtype, []).append(flat)
        total = sum(flat.nbytes for flats in by_type.values() for flat in flats)
        call = self._next_call("all-reduce", total)
        self._bytes_sent += 2 * (self.world_size - 1) * total // self.world_size
        for dtype, flats in sorted(by_type.items()):
            fused = flats[0] if len(flats) == 1 else np.concatenate(flats)
            if dtype == "<f8":
                blobs = self._gather(call, fused.tobytes())
                # The trainer checks the sums for infinity and NaN.
                with np.errstate(over="ignore", invalid="ignore"):
                    fused[:] = np.sum([np.frombuffer(blob) for blob in blobs], axis=0)
            else:
                for block in _blocks(fused):
                    block[:] = self._call_mlx(call, partial(self._all_sum, block, dtype))
            if len(flats) > 1:
                _split(fused, flats)

    def all_reduce_coded(
        self,
        array: NDArray[np.float32],  # noqa: ARG002
        codec: WireCodec,
        residual: NDArray[np.float32],  # noqa: ARG002
    ) -> None:
        """Raises CollectiveError: MLX adds internally, so partial sums cannot be encoded."""
        raise CollectiveError(f"collective.codec: {codec.name} works on collective=ring only")

    @property
    def bytes_sent(self) -> int:
        """What a ring would send for the all-reduces so far; MLX does not report the bytes it sends."""
        return self._bytes_sent

    @property
    def lost_paths(self) -> list[str]:
        """Always empty: MLX uses only the first of several cables."""
        return []

    @property
    def speed(self) -> RingSpeed | None:
        """Always None: MLX does not tell."""
        return None

    def broadcast(self, payload: bytes, root: int = 0) -> bytes:
        """Returns ``root``'s ``payload`` on every rank; raises as :meth:`all_reduce` does."""
        if not 0 <= root < self.world_size:
            raise ValueError(f"broadcast: root {root} is not a rank of this group of {self.world_size}")
        _check_blob(payload)
        call = self._next_call("broadcast")
        sizes = self._gather_sizes(call, len(payload))
        # A sum in which all ranks but the root contribute zeros.
        data = np.zeros(sizes[root], np.uint8)
        if root == self.rank:
            data[:] = np.frombuffer(payload, np.uint8)
        for block in _blocks(data):
            block[:] = self._call_mlx(call, partial(self._all_sum, block))
        return data.tobytes()

    def all_gather(self, payload: bytes) -> list[bytes]:
        """The ``payload`` of every rank, ordered by rank; raises as :meth:`all_reduce` does."""
        _check_blob(payload)
        return self._gather(self._next_call("all-gather"), payload)

    def barrier(self) -> None:
        """Returns once every rank has called it; raises as :meth:`all_reduce` does."""
        call = self._next_call("barrier")
        self._call_mlx(call, lambda: self._all_sum(np.ones(1, np.float32)))

    def open_channels(self, pairs: Collection[tuple[int, int]], purpose: str) -> Channels:  # noqa: ARG002
        """Raises CollectiveError: MLX's own send and receive wait forever where a rank is gone."""
        raise CollectiveError(f"collective=mlx can't send messages to one rank ({purpose}); use collective=ring")

    def tell_stopped(self) -> None:
        """See :meth:`~macft.collective.base.Collective.tell_stopped`."""
        if not self._closed and self._failure is None:
            self._failure = PeerStopped(f"{self._watch.name(self.rank)} was stopped by its user")
            self._health.reason = f"stopped {self._failure}"

    def close(self) -> None:
        """Leaves the group; after a failure it first reports the reason for some seconds. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        if self._failure is not None:
            # A thread of MLX may hang, which would keep this process from ending.
            atexit.register(_exit_now)
            time.sleep(_LINGER_SECONDS if self.world_size > 1 else 0.0)
        else:
            self._requests.put(None)
            self._thread.join()
            self._group = None  # MLX finalizes MPI when its group is freed
        self._server.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, KeyboardInterrupt):
            self.tell_stopped()
        elif error is not None and not self._closed and self._failure is None:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            self._failure = PeerLost(f"{self._watch.name(self.rank)} stopped with {reason}")
            self._health.reason = f"lost {self._failure}"
        self.close()

    def seconds(self) -> float:
        """Seconds since the current operation began."""
        return time.monotonic() - self._began

    def _next_call(self, kind: str, size: int | None = None) -> str:
        if self._closed:
            raise PeerLost(f"this group of rank {self.rank} is closed; no {kind} can be made")
        if self._failure is not None:
            raise self._failure
        self._calls += 1
        return f"{kind} {self._calls}" + (f" of {size} bytes" if size is not None else "")

    def _all_sum(self, block: FlatArray, dtype: str = "") -> FlatArray:
        local = mx.array(block)
        if dtype == BFLOAT16:
            local = local.view(mx.bfloat16)
        total = mx.distributed.all_sum(local, group=self._group, stream=self._stream)
        if dtype == BFLOAT16:
            total = total.view(mx.uint16, stream=self._stream)
        mx.eval(total)  # releases the GIL, unlike np.array on an array that is not evaluated
        return np.array(total)

    def _all_gather(self, block: FlatArray) -> FlatArray:
        gathered = mx.distributed.all_gather(mx.array(block), group=self._group, stream=self._stream)
        mx.eval(gathered)
        return np.array(gathered).reshape(self.world_size, -1)

    def _gather_sizes(self, call: str, size: int) -> list[int]:
        # Sent as two 32-bit halves, which every backend supports.
        halves = np.array([size >> 31, size & 0x7FFF_FFFF], np.int32)
        return [(int(high) << 31) + int(low) for high, low in self._call_mlx(call, lambda: self._all_gather(halves))]

    def _gather(self, call: str, payload: bytes) -> list[bytes]:
        sizes = self._gather_sizes(call, len(payload))
        own = np.zeros(max(sizes), np.uint8)
        own[: len(payload)] = np.frombuffer(payload, np.uint8)
        parts = [self._call_mlx(call, partial(self._all_gather, block)) for block in _blocks(own)]
        if not parts:
            return [b""] * self.world_size
        gathered = np.concatenate(parts, axis=1)
        return [gathered[rank, :size].tobytes() for rank, size in enumerate(sizes)]

    def _work(self) -> None:
        while request := self._requests.get():
            try:
                request.outcome.put(_Outcome(request.call(), None))
            except Exception as error:
                request.outcome.put(_Outcome(None, error))
            del request  # this frame would keep its arrays alive

    def _call_mlx(self, call: str, function: Callable[[], _T]) -> _T:
        """Runs ``function`` in MLX's thread; checks the other ranks until it returns."""
        health = self._health
        health.operation += 1
        health.call, self._began = call, time.monotonic()
        self._watch.begin_call()
        outcome: queue.SimpleQueue[_Outcome] = queue.SimpleQueue()
        self._requests.put(_Request(function, outcome))
        while True:
            try:
                value, error = outcome.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                if (failure := self._watch.obstacle(call, self.seconds())) is not None:
                    self._fail(failure)
                continue
            except KeyboardInterrupt:
                self.tell_stopped()
                raise
            except BaseException:
                self._failure = PeerLost(f"rank {self.rank} was interrupted in {call}; its group has ended")
                health.reason = f"lost {self._failure}"
                raise
            if error is not None:
                self._raise_mlx_error(call, error)
            health.call = ""
            return cast(_T, value)

    def _raise_mlx_error(self, call: str, error: Exception) -> NoReturn:
        text = " ".join(str(error).split())
        if self._health.operation == 1:
            self._failure = CollectiveError(f"MLX can't form its group: {text}")
            raise self._failure
        self._fail(self._watch.explain(call, text))

    def _fail(self, failure: GroupFailure) -> NoReturn:
        self._failure = failure.error
        self._health.reason = f"{failure.kind} {failure.text}"
        _log.warning("group ended (%s): %s", failure.kind, failure.text)
        raise self._failure


def _check_blob(payload: bytes) -> None:
    if len(payload) > MAX_BLOB_BYTES:
        raise ValueError(f"a blob of {len(payload)} bytes: {MAX_BLOB_BYTES} are the most")


def _blocks(flat: FlatArray) -> Iterator[FlatArray]:
    step = BLOCK_BYTES // flat.itemsize
    for start in range(0, flat.size, step):
        yield flat[start : start + step]


def _split(fused: FlatArray, arrays: Sequence[FlatArray]) -> None:
    start = 0
    for flat in arrays:
        flat[:] = fused[start : start + flat.size]
        start += flat.size


def _exit_now() -> None:
    """Ends this process, which has failed, without waiting for threads of MLX that hang."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
