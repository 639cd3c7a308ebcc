"""This rank's ports for its left neighbour, and the ZeroMQ options that all sockets of a ring share."""

from __future__ import annotations

from typing import Any, Protocol

import zmq

from macft.collective.security import RingSecurity
from macft.collective.settings import CollectiveConfig
from macft.collective.wire import MAX_HEADER_BYTES, bind

COPY_BELOW = 65_536
"""Smaller bodies are copied when sent; larger ones are read from the caller's memory until credited."""


class Closable(Protocol):
    """What is closed with its listener."""

    def close(self) -> None:
        """Safe to call twice."""
        ...


class Listener:
    """One bound ROUTER for each path (cable) of the left neighbour. Made first, so that ``address`` can be told.

    Args:
        address: ``host:port`` (port 0 for a free one); several paths as ``host:port+host:port``.
        settings: Waits and piece size of the ring to come.
        encrypted: Whether the ring is encrypted; ``security.meet`` then has to be called before it comes together.

    Raises:
        CollectiveError: an address can't be listened on.
    """

    def __init__(self, address: str, settings: CollectiveConfig, *, encrypted: bool = False):
        self.settings = settings
        _keep_freed_memory()
        self.context: zmq.Context[Any] = zmq.Context()
        self.security = RingSecurity(self.context) if encrypted else None
        self.sockets: list[zmq.Socket[Any]] = []
        self._kept: list[Closable] = []
        self.routers: list[tuple[zmq.Socket[Any], zmq.Socket[Any]]] = []
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

    def open(self, kind: int) -> zmq.Socket[Any]:
        """A socket with the ring's options; ZeroMQ reads most of them once, so before any bind or connect."""
        sock: zmq.Socket[Any] = self.context.socket(kind)
        self.sockets.append(sock)
        # `Links.leave` sees the last frames off. A socket that lingers by itself takes in nothing meanwhile,
        # and when the peer then hangs up, the next heartbeat aborts the process (libzmq 4.3.5, `Assertion
        # failed: !_io_error`; akin to libzmq issues 3937 and 4767).
        sock.linger = 0
        # Credits keep a member within its window; a limit here would stop the heartbeats of a link that
        # reaches it, and let a stranger who reaches it and hangs up abort the process, as above.
        sock.rcvhwm, sock.sndhwm = 0, 0
        sock.maxmsgsize = max(self.settings.piece_bytes, MAX_HEADER_BYTES)
        sock.heartbeat_ivl = int(self.settings.heartbeat * 1000)
        sock.heartbeat_timeout = int(self.settings.timeout * 1000)
        # After eleven days, so never: a new connection must not be spliced into a call. Not -1 either, which
        # throws away frames that came before the break, a goodbye for instance.
        sock.reconnect_ivl = 10**9
        sock.copy_threshold = COPY_BELOW
        if self.security is not None:
            self.security.apply(sock)
        return sock

    def watch(self, sock: zmq.Socket[Any], events: int) -> zmq.Socket[Any]:
        """A socket that receives ``sock``'s connection events."""
        address = f"inproc://monitor-{len(self.sockets)}"
        sock.monitor(address, events)
        monitor: zmq.Socket[Any] = self.context.socket(zmq.PAIR)
        monitor.linger, monitor.rcvhwm = 0, 0  # never full: that would hold up ZeroMQ's I/O thread
        monitor.connect(address)
        self.sockets.append(monitor)
        return monitor

    @property
    def encrypted(self) -> bool:
        """Whether the ring is encrypted, its streams too."""
        return self.security is not None

    def keep(self, other: Closable) -> None:
        """Closes ``other`` too when this is closed."""
        self._kept.append(other)

    def close(self) -> None:
        """Closes all sockets at once. Safe to call twice."""
        for other in self._kept:
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
    """Has the C library keep the memory of frames for the next ones, rather than fault new pages in for each.

    glibc maps each block anew above a threshold that grows when such a block is freed, up to 32 MiB, and returns free
    memory above twice that (mallopt(3), M_MMAP_THRESHOLD). Elsewhere this does nothing.
    """
    bytearray(_LARGEST_KEPT)


_LARGEST_KEPT = (32 << 20) - (64 << 10)
