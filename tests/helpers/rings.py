"""Rings on this machine: one call of ``work`` on each rank, or a ring that reduces while a test disturbs it."""

from __future__ import annotations

import json
import select
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np

from harness.runs import read_line
from macft.collective.ring.listener import Listener
from macft.collective.ring.ring import Ring
from macft.collective.settings import CollectiveConfig

SIZES = (3, 1_000, 100_000)


def local_listeners(
    world_size: int, config: CollectiveConfig | None = None, *, encrypted: bool = False
) -> list[Listener]:
    """A listener for each rank, on free ports of this machine."""
    return [Listener("127.0.0.1:0", config or CollectiveConfig(), encrypted=encrypted) for _ in range(world_size)]


def run_ranks(
    listeners: Sequence[Listener],
    work: Callable[[Ring], Any],
    *,
    addresses: Sequence[str] = (),
    catch: type[Exception] | tuple[type[Exception], ...] = (),
) -> list[Any]:
    """Builds a ring whose ranks are threads; returns what ``work`` returns on each rank.

    ``addresses`` replaces the listeners' own. An error of a type in ``catch`` is returned instead of raised.
    """
    world_size = len(listeners)
    reachable = list(addresses) or [listener.address for listener in listeners]
    keys = [listener.security.public_key for listener in listeners if listener.security]

    def run(rank: int) -> Any:
        if (security := listeners[rank].security) is not None:
            security.meet(keys, rank)
        try:
            with Ring(rank, world_size, reachable, listeners[rank], ring_id="test") as ring:
                return work(ring)
        except catch as error:
            return error

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(run, range(world_size)))


def next_message(rank: subprocess.Popen[str], seconds: float = 60) -> list[Any]:
    """The next line that a rank's process prints, a JSON list. Raises AssertionError if there is none in time."""
    assert rank.stdout is not None
    assert select.select([rank.stdout], [], [], seconds)[0], "a rank hangs"
    message: list[Any] = json.loads(read_line(rank.stdout))
    return message


class LiveRing:
    """The ranks' addresses and keys, and how many of their sums were wrong."""

    def __init__(self, world_size: int, *, encrypted: bool, streams: bool = True):
        config = CollectiveConfig(timeout=20.0, heartbeat=0.5, streams=streams)
        self.listeners = local_listeners(world_size, config, encrypted=encrypted)
        self.addresses = [listener.address for listener in self.listeners]
        self.keys = [listener.security.public_key if listener.security else b"" for listener in self.listeners]
        self.calls = 0
        self.wrong = 0
        self._stop, self._turn = threading.Event(), threading.Condition()

    def goes_on(self) -> None:
        """Waits until two more rounds of sums, begun after this call, have come out right."""
        with self._turn:
            goal = self.calls + 2
            assert self._turn.wait_for(lambda: self.calls >= goal, 60), "the ring stands still"
        assert self.wrong == 0

    def run(self, rank: int) -> None:
        """One rank's part: sums without end, until all know that the test is over."""
        world_size, listener = len(self.addresses), self.listeners[rank]
        if listener.security is not None:
            listener.security.meet(self.keys, rank)
        expected = world_size * (world_size + 1) / 2
        with Ring(rank, world_size, self.addresses, listener, ring_id="live") as ring:
            over = np.zeros(1)
            while not over[0]:
                arrays = [np.full(size, rank + 1.0, np.float32) for size in SIZES]
                for array in arrays:
                    ring.all_reduce([array])
                right = all((array == expected).all() for array in arrays)
                over = np.array([float(rank == 0 and self._stop.is_set())])
                ring.all_reduce([over])
                with self._turn:
                    self.wrong += not right
                    self.calls += rank == 0
                    self._turn.notify_all()

    def stop(self) -> None:
        self._stop.set()


@contextmanager
def live_ring(world_size: int = 2, *, encrypted: bool, via: Any = None) -> Iterator[LiveRing]:
    """A ring at work; at the end of the block all its sums must have been right.

    ``via`` replaces the address of rank 1; all goes that way then, for there are no streams.
    """
    live = LiveRing(world_size, encrypted=encrypted, streams=via is None)
    if via is not None:
        live.addresses[1] = via(live.addresses[1])
    with ThreadPoolExecutor(world_size) as pool:
        ranks = [pool.submit(live.run, rank) for rank in range(world_size)]
        try:
            live.goes_on()
            yield live
            live.goes_on()
        finally:
            live.stop()
            for rank in ranks:
                rank.result(60)
    assert live.wrong == 0
