"""Measures latency and bandwidth between two machines over plain TCP.

``python -m macft.network.link_probe serve`` prints a port and answers until its standard input ends; ``measure ADDRESS
PORT`` prints what it found as JSON. Both read the token, hexadecimal, from the first line of standard input.
"""

from __future__ import annotations

import hmac
import json
import socket
import sys
import threading
import time
from dataclasses import dataclass

from macft.errors import LaunchError

_PINGS = 50
_BULK_BYTES = 32 * 2**20
_SECONDS = 60.0
_PIECE_BYTES = 1_000_000
TOKEN_BYTES = 16


@dataclass(frozen=True)
class LinkMeasurement:
    """Latency one way in seconds, bandwidth in bytes a second."""

    latency: float
    bandwidth: float

    @property
    def cost(self) -> float:
        """Seconds to pass on a piece of one megabyte."""
        return self.latency + _PIECE_BYTES / self.bandwidth


class ProbeServer:
    """Answers :func:`measure` of those who know ``token``, in a thread of its own, one after the other."""

    def __init__(self, token: bytes):
        self._token = token
        self._socket = socket.create_server(("0.0.0.0", 0))
        self.port = int(self._socket.getsockname()[1])
        threading.Thread(target=self._serve, name="link-probe", daemon=True).start()

    def admit(self, token: bytes) -> None:
        """Answers those who know ``token`` from now on."""
        self._token = token

    def close(self) -> None:
        """Answers no more."""
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(_SECONDS)
                try:
                    self._answer(connection)
                except OSError:
                    continue

    def _answer(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if not hmac.compare_digest(_receive(connection, TOKEN_BYTES), self._token):
            return
        for _ in range(_PINGS):
            connection.sendall(_receive(connection, 1))
        left = _BULK_BYTES
        while left:
            left -= len(_receive_some(connection, left))
        connection.sendall(b".")


def measure(address: str, port: int, token: bytes) -> LinkMeasurement:
    """Measures the way to a :class:`ProbeServer`.

    Raises:
        LaunchError: it can't be reached.
    """
    try:
        with socket.create_connection((address, port), 10.0) as connection:
            connection.settimeout(_SECONDS)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.sendall(token)
            trips = []
            for _ in range(_PINGS):
                began = time.perf_counter()
                connection.sendall(b".")
                _receive(connection, 1)
                trips.append(time.perf_counter() - began)
            piece = bytes(2**20)
            began = time.perf_counter()
            for _ in range(_BULK_BYTES // len(piece)):
                connection.sendall(piece)
            _receive(connection, 1)
            return LinkMeasurement(sorted(trips)[_PINGS // 2] / 2, _BULK_BYTES / (time.perf_counter() - began))
    except OSError as error:
        raise LaunchError(f"{address}:{port} can't be reached ({error}); is a firewall on?") from None


def _receive_some(connection: socket.socket, at_most: int) -> bytes:
    piece = connection.recv(min(at_most, 2**20))
    if not piece:
        raise ConnectionError("ended")
    return piece


def _receive(connection: socket.socket, count: int) -> bytes:
    parts = bytearray()
    while len(parts) < count:
        parts += _receive_some(connection, count - len(parts))
    return bytes(parts)


def main(argv: list[str]) -> int:
    """Serves or measures; returns the exit status."""
    token = bytes.fromhex(sys.stdin.readline())
    if argv == ["serve"]:
        server = ProbeServer(token)
        print(server.port, flush=True)
        sys.stdin.read()
        server.close()
        return 0
    try:
        found = measure(argv[1], int(argv[2]), token)
    except LaunchError as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps({"latency": found.latency, "bandwidth": found.bandwidth}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
