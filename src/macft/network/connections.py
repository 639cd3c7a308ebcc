"""Accepts TCP connections so that one that says nothing, or little, keeps nobody else waiting."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from typing import TypeAlias

Serve: TypeAlias = Callable[[socket.socket, Callable[[], None]], None]
"""Serves a connection, in a thread of its own; calls the second argument once the other side has shown who it is."""

MOST_UNKNOWN = 16
"""Connections at a time that have not shown who they are."""
_SWEEP_SECONDS = 0.5
_IDLE_SECONDS, _PROBE_SECONDS, _PROBES = 10, 5, 3
_KEEPALIVE_ON_MACOS = 0x10
"""Of ``netinet/tcp.h``; Linux calls it TCP_KEEPIDLE."""


class ConnectionServer:
    """Gives each connection to ``server`` a thread that calls ``serve``; closes the connection when that returns.

    A connection that has not shown who it is within ``seconds`` is ended; so is the oldest of those when there are more
    than ``MOST_UNKNOWN``. ``serve`` then finds the end of the connection where it reads or writes. An OSError that it
    raises is ignored.

    Args:
        server: A listening socket, which this object then owns.
        serve: See :data:`Serve`.
        seconds: For all of what a connection does until it has shown who it is.
        name: Of the threads.
    """

    def __init__(self, server: socket.socket, serve: Serve, *, seconds: float, name: str):
        self.port = int(server.getsockname()[1])
        self._server, self._serve, self._seconds, self._name = server, serve, seconds, name
        self._unknown: dict[socket.socket, float] = {}
        self._lock = threading.Lock()
        self._is_closed = False
        server.settimeout(_SWEEP_SECONDS)
        self._thread = threading.Thread(target=self._accept, name=name, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Accepts no more connections, and closes those that have not shown who they are. Safe to call twice."""
        self._is_closed = True
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)  # wakes the thread; macOS wakes it on closing
        self._server.close()
        with self._lock:
            for connection in self._unknown:
                _end(connection)

    def _accept(self) -> None:
        while not self._is_closed:
            try:
                connection, _ = self._server.accept()
            except TimeoutError:
                self._end_late_ones()
                continue
            except OSError:  # the other side has gone already, or there are too many open files
                time.sleep(0.0 if self._is_closed else 0.01)
                continue
            with self._lock:
                self._unknown[connection] = time.monotonic()
                if len(self._unknown) > MOST_UNKNOWN:
                    _end(self._take_oldest())
            self._end_late_ones()
            threading.Thread(target=self._run, args=(connection,), name=self._name, daemon=True).start()

    def _take_oldest(self) -> socket.socket:
        oldest = next(iter(self._unknown))
        del self._unknown[oldest]
        return oldest

    def _end_late_ones(self) -> None:
        with self._lock:
            while self._unknown and time.monotonic() - next(iter(self._unknown.values())) > self._seconds:
                _end(self._take_oldest())

    def _run(self, connection: socket.socket) -> None:
        def is_known() -> None:
            with self._lock:
                if self._unknown.pop(connection, None) is None:
                    raise ConnectionAbortedError("closed, for it took too long or others came")

        with connection, contextlib.suppress(OSError):
            connection.settimeout(self._seconds)
            self._serve(connection, is_known)
        with self._lock:
            self._unknown.pop(connection, None)


def _end(connection: socket.socket) -> None:
    """Ends the connection for the thread that reads it. That thread closes it."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def end_if_unreachable(
    connection: socket.socket, *, idle: int = _IDLE_SECONDS, every: int = _PROBE_SECONDS, probes: int = _PROBES
) -> None:
    """Lets an idle ``connection`` break when the other machine is gone, asleep or unplugged: TCP's keep-alive.

    After ``idle`` seconds without a packet the system sends one ``every`` so many seconds; after so many ``probes``
    without an answer whoever reads gets an OSError.
    """
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, "TCP_KEEPIDLE", _KEEPALIVE_ON_MACOS), idle)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, every)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, probes)
