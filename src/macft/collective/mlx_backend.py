"""The collective over MLX's own communication, ``mx.distributed``: its ring, JACCL, NCCL or MPI.

MLX's calls can't be interrupted and need not end: its ring can hang (mlx issue 4475), and waits for a silent neighbour
for ever. So they run in a thread, while the caller watches the other ranks' pulses and gives up for a known reason.
"""

from __future__ import annotations

import atexit
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import TracebackType
from typing import Any, NoReturn, Self

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from macft.collective.codecs.wire_codec import WireCodec
from macft.collective.dtypes import BFLOAT16, view
from macft.collective.health import Health, HealthServer, ask
from macft.collective.settings import CollectiveConfig
from macft.collective.wire import MAX_BLOB_BYTES
from macft.errors import CollectiveError, PeerLost, PeerTimeout, ProtocolError

BLOCK_BYTES = 16 * 1024 * 1024
"""Most bytes of one operation of MLX, so that one that takes ``collective.timeout`` is known to hang."""
_ASK_SECONDS = 0.5
_FAREWELL_SECONDS = 3.0
"""How long a rank that gives up goes on telling the others why."""
_FAILURES: dict[str, type[CollectiveError]] = {"lost": PeerLost, "timeout": PeerTimeout, "protocol": ProtocolError}


class MlxCollective:
    """The :class:`~macft.collective.base.Collective` of a group of MLX's.

    A process can be in one such group only, for MLX keeps it for as long as the process lives. float64 arrays, which
    MLX's communication does not know, are gathered and summed in the order of the ranks.

    Args:
        initialize: Joins MLX's group; called in the thread that makes all later calls.
        pulse: This rank's; the collective then owns it.
        pulses: Addresses of all ranks' pulses, by rank; None: to be gathered once the group exists.
        settings: Its waits.
        names: Of the ranks, for messages.
        secret: Known to the ranks of this run only.

    Raises:
        CollectiveError: the group did not come together.
    """

    def __init__(
        self,
        initialize: Callable[[], Any],
        state: Health,
        pulse: HealthServer,
        pulses: Sequence[str] | None,
        settings: CollectiveConfig,
        *,
        names: Sequence[str] = (),
        secret: str = "",
    ):
        self._settings, self._names, self._secret = settings, names, secret
        self._state, self._pulse = state, pulse
        self._began = time.monotonic()
        self._calls = self._bytes_sent = 0
        self._failure: CollectiveError | None = None
        self._closed = False
        self._addresses = list(pulses or [])
        self._bad: dict[int, tuple[str, float]] = {}  # by rank: what is wrong with its pulse, and since when
        self._orders: queue.SimpleQueue[tuple[Callable[[], Any], queue.SimpleQueue[Any]] | None] = queue.SimpleQueue()
        self._group: Any = None
        self._thread = threading.Thread(target=self._work, name="mlx-collective", daemon=True)
        self._thread.start()
        self._stream = mx.gpu if settings.mlx_backend == "nccl" else mx.cpu
        try:
            self._group = self._operate("joining MLX's group", initialize)
            self.rank, self.world_size = int(self._group.rank()), int(self._group.size())
            self._state.rank = self.rank
            if not pulses:
                self._addresses = [blob.decode() for blob in self.all_gather(self._pulse.address.encode())]
        except BaseException:
            self.close()
            raise

    rank: int = 0
    world_size: int = 1

    def all_reduce(self, arrays: Sequence[Any]) -> None:
        """Sums each array over all ranks, in place; arrays and errors as :meth:`macft.collective.ring.Ring.all_reduce`.

        Arrays whose sizes differ from rank to rank are not told apart: MLX sums them wrongly, or hangs.
        """
        by_type: dict[str, list[NDArray[Any]]] = {}
        for number, array in enumerate(arrays):
            try:
                flat, dtype = view(array)
            except (ValueError, TypeError) as error:
                raise ValueError(f"all_reduce: array {number} is {error}") from None
            by_type.setdefault(dtype, []).append(flat)
        doing = self._next_call("all-reduce", sum(flat.nbytes for flats in by_type.values() for flat in flats))
        total = sum(flat.nbytes for flats in by_type.values() for flat in flats)
        self._bytes_sent += 2 * (self.world_size - 1) * total // self.world_size
        for dtype, flats in sorted(by_type.items()):
            whole = flats[0] if len(flats) == 1 else np.concatenate(flats)
            if dtype == "<f8":
                everyone = self._gather(doing, whole.tobytes())
                # Infinity and NaN are the trainer's to judge, once it has the sums.
                with np.errstate(over="ignore", invalid="ignore"):
                    whole[:] = np.sum([np.frombuffer(blob) for blob in everyone], axis=0)
            else:
                for block in _blocks(whole):
                    block[:] = self._mlx(doing, partial(self._all_sum, block, dtype))
            if len(flats) > 1:
                _split(whole, flats)

    def all_reduce_coded(self, array: Any, codec: WireCodec, residual: Any) -> None:  # noqa: ARG002
        """MLX adds up inside: nothing can be encoded on the way. Raises CollectiveError."""
        raise CollectiveError(f"collective.codec: {codec.name} works on collective=ring only")

    @property
    def bytes_sent(self) -> int:
        """What a ring sends for the all-reduces so far; MLX does not tell."""
        return self._bytes_sent

    @property
    def lost_paths(self) -> list[str]:
        """None: of several cables MLX uses the first."""
        return []

    def broadcast(self, payload: bytes, root: int = 0) -> bytes:
        """Returns ``root``'s ``payload`` on every rank; raises as :meth:`all_reduce` does."""
        if not 0 <= root < self.world_size:
            raise ValueError(f"broadcast: root {root} is not a rank of this group of {self.world_size}")
        _check_blob(payload)
        doing = self._next_call("broadcast")
        sizes = self._gather_sizes(doing, len(payload))
        # A sum in which all but the root's bytes are 0.
        whole = np.zeros(sizes[root], np.uint8)
        if root == self.rank:
            whole[:] = np.frombuffer(payload, np.uint8)
        for block in _blocks(whole):
            block[:] = self._mlx(doing, partial(self._all_sum, block))
        return whole.tobytes()

    def all_gather(self, payload: bytes) -> list[bytes]:
        """Every rank's ``payload``, by rank; raises as :meth:`all_reduce` does."""
        _check_blob(payload)
        return self._gather(self._next_call("all-gather"), payload)

    def barrier(self) -> None:
        """Returns once every rank has called it; raises as :meth:`all_reduce` does."""
        doing = self._next_call("barrier")
        self._mlx(doing, lambda: self._all_sum(np.ones(1, np.float32)))

    def close(self) -> None:
        """Leaves the group; after a failure it first tells the others why, for some seconds. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        if self._failure is not None:
            # A thread of MLX's may hang, which would keep this process from ending.
            atexit.register(_end_now)
            time.sleep(_FAREWELL_SECONDS if self.world_size > 1 else 0.0)
        else:
            self._orders.put(None)
            self._thread.join()
            self._group = None  # MLX leaves MPI, for one, when its group is given up
        self._pulse.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not self._closed and self._failure is None:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            self._failure = PeerLost(f"{self._name(self.rank)} stopped with {reason}")
            self._state.reason = f"lost {self._failure}"
        self.close()

    def _next_call(self, kind: str, size: int | None = None) -> str:
        if self._closed:
            raise PeerLost(f"this group of rank {self.rank} is closed; no {kind} can be made")
        if self._failure is not None:
            raise self._failure
        self._calls += 1
        return f"{kind} {self._calls}" + (f" of {size} bytes" if size is not None else "")

    def _all_sum(self, block: NDArray[Any], dtype: str = "") -> NDArray[Any]:
        local = mx.array(block)
        if dtype == BFLOAT16:
            local = local.view(mx.bfloat16)
        total = mx.distributed.all_sum(local, group=self._group, stream=self._stream)
        if dtype == BFLOAT16:
            total = total.view(mx.uint16, stream=self._stream)
        mx.eval(total)  # which, unlike NumPy's asking for the values, lets other threads of Python run
        return np.array(total)

    def _all_gather(self, block: NDArray[Any]) -> NDArray[Any]:
        found = mx.distributed.all_gather(mx.array(block), group=self._group, stream=self._stream)
        mx.eval(found)
        return np.array(found).reshape(self.world_size, -1)

    def _gather_sizes(self, doing: str, size: int) -> list[int]:
        # As two 32-bit halves, which every backend can carry.
        halves = self._mlx(doing, lambda: self._all_gather(np.array([size >> 31, size & 0x7FFF_FFFF], np.int32)))
        return [(int(high) << 31) + int(low) for high, low in halves]

    def _gather(self, doing: str, payload: bytes) -> list[bytes]:
        sizes = self._gather_sizes(doing, len(payload))
        own = np.zeros(max(sizes), np.uint8)
        own[: len(payload)] = np.frombuffer(payload, np.uint8)
        parts = [self._mlx(doing, partial(self._all_gather, block)) for block in _blocks(own)]
        if not parts:
            return [b""] * self.world_size
        whole = np.concatenate(parts, axis=1)
        return [whole[rank, :size].tobytes() for rank, size in enumerate(sizes)]

    def _mlx(self, doing: str, call: Callable[[], NDArray[Any]]) -> NDArray[Any]:
        result: NDArray[Any] = self._operate(doing, call)
        return result

    def _work(self) -> None:
        while order := self._orders.get():
            call, answer = order
            try:
                answer.put((call(), None))
            except Exception as error:
                answer.put((None, error))
            del order, call, answer  # or this frame would keep what they hold

    def _operate(self, doing: str, call: Callable[[], Any]) -> Any:
        """Has the thread make one call of MLX's; watches the other ranks until it returns."""
        state = self._state
        state.operation += 1
        state.doing, self._began = doing, time.monotonic()
        self._bad.clear()
        answer: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._orders.put((call, answer))
        while True:
            try:
                value, error = answer.get(timeout=_ASK_SECONDS)
            except queue.Empty:
                self._look(doing)
                continue
            except BaseException:
                self._failure = PeerLost(f"rank {self.rank} was interrupted in {doing}; its group has ended")
                state.reason = f"lost {self._failure}"
                raise
            if error is not None:
                self._explain(doing, error)
            state.doing = ""
            return value

    def seconds(self) -> float:
        """Seconds since the current operation began."""
        return time.monotonic() - self._began

    def _look(self, doing: str) -> None:
        """Asks the others what they are at; raises once it is clear that ``doing`` won't end."""
        seconds, limit = self.seconds(), self._settings.timeout
        if self._state.operation == 1:  # nobody knows anybody yet
            if seconds > limit:
                self._fail("timeout", f"MLX's group did not come together within {limit:g} s; do all ranks run?")
            return
        pulses = self._ask_all()
        for rank, (what, since) in self._bad.items():
            # MLX itself tells of a connection that breaks; this is for those it does not notice.
            if (lasted := time.monotonic() - since) > limit:
                kind = "lost" if what == "ended" else "timeout"
                self._fail(kind, f"{self._name(rank)} has been {what} for {lasted:.0f} s while {doing} went on")
        for rank, pulse in pulses.items():
            if pulse.reason:
                kind, _, reason = pulse.reason.partition(" ")
                self._fail(kind if kind in _FAILURES else "lost", reason)
            if pulse.operation == self._state.operation and pulse.doing and pulse.doing != doing:
                text = f"{self._name(rank)} is at {pulse.doing}, this rank at {doing}"
                self._fail("protocol", f"{text}; do all ranks run the same macft, data and configuration?")
        behind = {rank: pulse for rank, pulse in pulses.items() if pulse.operation < self._state.operation}
        if behind and seconds > self._settings.patience:
            rank = min(behind, key=lambda rank: behind[rank].operation)
            text = f"{self._name(rank)} is alive but did not come to {doing} for {seconds:.0f} s"
            self._fail("timeout", f"{text}; it may still compute: collective.patience sets the limit")
        stuck = all(pulse.doing and pulse.seconds > limit for pulse in pulses.values())
        if not behind and not self._bad and seconds > limit and stuck:
            text = f"all ranks have been in {doing} for {seconds:.0f} s and it does not end"
            self._fail("timeout", f"{text}: MLX's communication hangs (mlx issue 4475); collective=ring does not")
        if seconds > self._settings.patience:
            self._fail("timeout", f"{doing} did not end for {seconds:.0f} s; collective.patience sets the limit")

    def _ask_all(self) -> dict[int, Health]:
        pulses = {}
        for rank, address in enumerate(self._addresses):
            if rank == self.rank:
                continue
            found = ask(address, self._secret)
            if isinstance(found, Health):
                pulses[rank] = found
                self._bad.pop(rank, None)
            elif self._bad.get(rank, ("", 0.0))[0] != found:
                self._bad[rank] = (found, time.monotonic())
        return pulses

    def _explain(self, doing: str, error: Exception) -> NoReturn:
        """MLX's own error, with the name of the rank that is gone where its pulse shows it."""
        what = " ".join(str(error).split())
        if self._state.operation == 1:
            self._failure = CollectiveError(f"MLX can't form its group: {what}")
            raise self._failure
        pulses = self._ask_all()
        for pulse in pulses.values():
            if pulse.reason:
                kind, _, reason = pulse.reason.partition(" ")
                self._fail(kind if kind in _FAILURES else "lost", reason)
        gone = " and ".join(self._name(rank) for rank in self._bad) or "a neighbour"
        self._fail("lost", f"{gone} left while {doing} went on (MLX: {what})")

    def _fail(self, kind: str, text: str) -> NoReturn:
        self._failure = _FAILURES[kind](text)
        self._state.reason = f"{kind} {text}"
        raise self._failure

    def _name(self, rank: int) -> str:
        known = [*self._names[rank : rank + 1], *self._addresses[rank : rank + 1]]
        return f"rank {rank}" + (f" ({', '.join(dict.fromkeys(word for word in known if word))})" if known else "")


def _check_blob(payload: bytes) -> None:
    if len(payload) > MAX_BLOB_BYTES:
        raise ValueError(f"a blob of {len(payload)} bytes: {MAX_BLOB_BYTES} are the most")


def _blocks(flat: NDArray[Any]) -> Iterator[NDArray[Any]]:
    step = BLOCK_BYTES // flat.itemsize
    for start in range(0, flat.size, step):
        yield flat[start : start + step]


def _split(whole: NDArray[Any], arrays: Sequence[NDArray[Any]]) -> None:
    start = 0
    for flat in arrays:
        flat[:] = whole[start : start + flat.size]
        start += flat.size


def _end_now() -> None:
    """Ends this process, which has failed, past whatever threads of MLX's hang."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
