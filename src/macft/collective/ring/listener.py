"""This rank's ports for its left neighbour, and the ZeroMQ options of all sockets of a ring."""

from __future__ import annotations

from typing import Protocol

import zmq

from macft.collective.ring.security import RingSecurity
from macft.collective.settings import CollectiveConfig
from macft.collective.wire import MAX_HEADER_BYTES, bind

COPY_BELOW = 65_536
"""Smaller bodies are copied when sent; larger ones are read from the caller's memory until credited."""


class Closable(Protocol):
    """An object that a listener closes."""

    def close(self) -> None:
        """Safe to call twice."""
        ...


class Listener:
    """One bound ROUTER for each path (cable) from the left neighbour. Made before the ring, to have its ``address``.

    Args:
        address: ``host:port`` (port 0 for a free one); several paths as ``host:port+host:port``.
        settings: Timeouts and piece size of the ring.
        encrypted: Whether the ring is encrypted; ``security.meet`` must then be called before the ring forms.

    Raises:
        CollectiveError: an address cannot be listened on.
    """

    def __init__(self, address: str, settings: CollectiveConfig, *, encrypted: bool = False):
        self.settings = settings
        _keep_freed_memory()
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.security = RingSecurity(self.context) if encrypted else None
        self.sockets: list[zmq.Socket[bytes]] = []
        self._closed_with_this: list[Closable] = []
        self.routers: list[tuple[zmq.Socket[bytes], zmq.Socket[bytes]]] = []
        """Each path's ROUTER and its monitor."""
        bound = []
        try:
            for path in address.split("+"):
                router = self.open(zmq.ROUTER)
                monitor = self.watch(router, zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED)
                bound.append(bind(router, path))
                self.routers.append((router, monitor))
        except BaseException:
            self.close()
            raise
        self.address = "+".join(bound)

    def open(self, kind: int) -> zmq.Socket[bytes]:
        """A socket with the ring's options. They are set first: ZeroMQ reads most of them at bind or connect."""
        sock: zmq.Socket[bytes] = self.context.socket(kind)
        self.sockets.append(sock)
        # `Links.leave` waits for the last frames instead. A lingering socket does not read; if the peer then closes
        # the connection, the next heartbeat aborts the process (libzmq 4.3.5, `Assertion failed: !_io_error`;
        # similar to libzmq issues 3937 and 4767).
        sock.linger = 0
        # Credits limit what a member sends. A limit here would stop the heartbeats of a link that reaches it, and a
        # stranger that reaches it and disconnects would abort the process, as above.
        sock.rcvhwm, sock.sndhwm = 0, 0
        sock.maxmsgsize = max(self.settings.piece_bytes, MAX_HEADER_BYTES)
        sock.heartbeat_ivl = int(self.settings.heartbeat * 1000)
        sock.heartbeat_timeout = int(self.settings.timeout * 1000)
        # Eleven days, so never: a new connection must not continue a call. Not -1, which drops frames that arrived
        # before the connection ended, such as a goodbye.
        sock.reconnect_ivl = 10**9
        sock.copy_threshold = COPY_BELOW
        if self.security is not None:
            self.security.apply(sock)
        return sock

    def watch(self, sock: zmq.Socket[bytes], events: int) -> zmq.Socket[bytes]:
        """A socket that receives ``sock``'s connection events."""
        address = f"inproc://monitor-{len(self.sockets)}"
        sock.monitor(address, events)
        monitor: zmq.Socket[bytes] = self.context.socket(zmq.PAIR)
        monitor.linger, monitor.rcvhwm = 0, 0  # no limit: a full queue would block ZeroMQ's I/O thread
        monitor.connect(address)
        self.sockets.append(monitor)
        return monitor

    @property
    def encrypted(self) -> bool:
        """Whether the ring and its streams are encrypted."""
        return self.security is not None

    def keep(self, other: Closable) -> None:
        """Closes ``other`` when this listener is closed."""
        self._closed_with_this.append(other)

    def close(self) -> None:
        """Closes all sockets at once. Safe to call twice."""
        for other in self._closed_with_this:
            other.close()
        for sock in self.sockets:
            if not sock.closed and sock.type != zmq.PAIR:
                sock.disable_monitor()
        for sock in self.sockets:
            sock.close()
        if self.security is not None:
            self.security.close()
        self.context.term()


def _keep_freed_memory() -> None:
    """Makes glibc reuse the memory of frames, instead of mapping new pages for each.

    glibc maps blocks above a threshold. Freeing such a block raises the threshold to its size, up to 32 MiB
    (mallopt(3), M_MMAP_THRESHOLD). With other C libraries this has no effect.
    """
    bytearray(_LARGEST_KEPT)


_LARGEST_KEPT = (32 << 20) - (64 << 10)
