"""A ring that goes on adding up while a test does something to it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np

from macft.collective.listener import Listener
from macft.collective.ring import Ring
from macft.collective.settings import CollectiveConfig

SIZES = (3, 1_000, 100_000)


class LiveRing:
    """The ranks' addresses and keys, and what became of their sums."""

    def __init__(self, world_size: int, *, encrypted: bool, streams: bool = True):
        config = CollectiveConfig(timeout=20.0, heartbeat=0.5, streams=streams)
        self.listeners = [Listener("127.0.0.1:0", config, encrypted=encrypted) for _ in range(world_size)]
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
