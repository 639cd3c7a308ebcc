"""What the wire itself can do: the bytes of a ring all-reduce, copied round the ring over plain TCP."""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Sequence

JOIN_SECONDS = 30.0


class RawTcp:
    """Each rank sends 2(n-1)/n of the array to its right neighbour while it takes as much from its left one.

    No ring all-reduce can be faster: it must send as much, and also add. Nothing is summed here.
    """

    def __init__(self, rank: int, addresses: Sequence[str]):
        self._rank, self._ranks = rank, len(addresses)
        places = [(host, int(port)) for host, _, port in (address.rpartition(":") for address in addresses)]
        with socket.create_server(places[rank]) as server:
            server.settimeout(JOIN_SECONDS)
            self._right = _connect(places[(rank + 1) % len(places)])
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
        """Moves the bytes."""
        self._move(self._out, self._in)

    def first(self) -> float:
        """The sum that others would have; none is made here."""
        return self._ranks * (self._ranks + 1) / 2

    def clear(self) -> None:
        """Nothing grows."""

    def barrier(self) -> None:
        """Twice round the ring, so that nobody goes on before the last has come."""
        for _ in range(self._ranks):
            self._move(memoryview(b"."), memoryview(bytearray(1)))

    def close(self) -> None:
        """Closes both connections."""
        self._left.close()
        self._right.close()

    def _move(self, out: memoryview, into: memoryview) -> None:
        while out or into:
            reads, writes = [self._left] if into else [], [self._right] if out else []
            readable, writable, _ = select.select(reads, writes, [])
            if readable:
                received = self._left.recv_into(into)
                if not received:
                    raise ConnectionError("the left neighbour has gone")
                into = into[received:]
            if writable:
                out = out[self._right.send(out) :]


def _connect(place: tuple[str, int]) -> socket.socket:
    deadline = time.monotonic() + JOIN_SECONDS
    while True:
        try:
            return socket.create_connection(place, timeout=JOIN_SECONDS)
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
