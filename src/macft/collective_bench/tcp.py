"""The speed of the network itself: the bytes of a ring all-reduce, sent round the ring over plain TCP."""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Sequence

JOIN_SECONDS = 30.0


class RawTcp:
    """Each rank sends 2(n-1)/n of the array to its right neighbour, and receives as much from its left one.

    No ring all-reduce can be faster: it sends as many bytes and also adds them. Nothing is summed here.
    """

    def __init__(self, rank: int, addresses: Sequence[str]):
        self._rank, self._ranks = rank, len(addresses)
        endpoints = [(host, int(port)) for host, _, port in (address.rpartition(":") for address in addresses)]
        with socket.create_server(endpoints[rank]) as server:
            server.settimeout(JOIN_SECONDS)
            self._right = _connect(endpoints[(rank + 1) % len(endpoints)])
            self._left, _ = server.accept()
        for end in (self._left, self._right):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            end.setblocking(False)
        self._out, self._in = memoryview(b""), memoryview(b"")

    def prepare(self, size: int) -> None:
        """Makes the buffers for an array of ``size`` bytes."""
        moved = max(4, 2 * (self._ranks - 1) * size // self._ranks)
        self._out, self._in = memoryview(bytearray(moved)), memoryview(bytearray(moved))

    def reduce(self) -> None:
        """Sends and receives the bytes."""
        self._move(self._out, self._in)

    def first(self) -> float:
        """The sum that an all-reduce would give; none is computed here."""
        return self._ranks * (self._ranks + 1) / 2

    def clear(self) -> None:
        """Does nothing: no sums are made."""

    def barrier(self) -> None:
        """One byte travels round the ring, so that no rank continues before the last one has called it."""
        for _ in range(self._ranks):
            self._move(memoryview(b"."), memoryview(bytearray(1)))

    def close(self) -> None:
        """Closes both connections."""
        self._left.close()
        self._right.close()

    def _move(self, unsent: memoryview, unfilled: memoryview) -> None:
        while unsent or unfilled:
            reads, writes = [self._left] if unfilled else [], [self._right] if unsent else []
            readable, writable, _ = select.select(reads, writes, [])
            if readable:
                received = self._left.recv_into(unfilled)
                if not received:
                    raise ConnectionError("the left neighbour has gone")
                unfilled = unfilled[received:]
            if writable:
                unsent = unsent[self._right.send(unsent) :]


def _connect(endpoint: tuple[str, int]) -> socket.socket:
    deadline = time.monotonic() + JOIN_SECONDS
    while True:
        try:
            return socket.create_connection(endpoint, timeout=JOIN_SECONDS)
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
