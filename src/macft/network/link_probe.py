"""Measures latency and bandwidth between two machines over plain TCP.

``python -m macft.network.link_probe serve`` prints a port and answers until its standard input ends; ``measure ADDRESS
PORT`` prints the result as JSON. Both read the token, in hexadecimal, from the first line of standard input.
"""

from __future__ import annotations

import hmac
import json
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from macft.errors import LaunchError
from macft.network.connections import ConnectionServer

_PINGS = 50
_BULK_BYTES = 32 * 2**20
_SECONDS = 60.0
_TOKEN_SECONDS = 5.0
_PIECE_BYTES = 1_000_000
CONNECT_SECONDS = 5.0
"""Time for a connection on a local network: enough for two packets that get lost."""
TOKEN_BYTES = 16


@dataclass(frozen=True)
class LinkMeasurement:
    """One-way latency in seconds, bandwidth in bytes a second."""

    latency: float
    bandwidth: float

    @property
    def cost(self) -> float:
        """Seconds to send one megabyte."""
        return self.latency + _PIECE_BYTES / self.bandwidth


class ProbeServer:
    """Answers :func:`measure` of clients that know ``token`` (16 bytes), in threads of its own, one at a time.

    A connection that does not send the token within 5 seconds is closed, and keeps nobody waiting meanwhile.
    """

    def __init__(self, token: bytes):
        self._token = token
        self._turn = threading.Lock()
        server = socket.create_server(("0.0.0.0", 0))
        self._connections = ConnectionServer(server, self._answer, seconds=_TOKEN_SECONDS, name="link-probe")
        self.port = self._connections.port

    def admit(self, token: bytes) -> None:
        """Replaces the token."""
        self._token = token

    def close(self) -> None:
        """Stops answering."""
        self._connections.close()

    def _answer(self, connection: socket.socket, is_known: Callable[[], None]) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if not hmac.compare_digest(_receive(connection, TOKEN_BYTES), self._token):
            return
        is_known()
        connection.settimeout(_SECONDS)
        with self._turn:
            for _ in range(_PINGS):
                connection.sendall(_receive(connection, 1))
            remaining = _BULK_BYTES
            while remaining:
                remaining -= len(_receive_some(connection, remaining))
            connection.sendall(b".")


def measure(address: str, port: int, token: bytes) -> LinkMeasurement:
    """Measures the link to a :class:`ProbeServer`.

    Raises:
        LaunchError: it cannot be reached.
    """
    try:
        with socket.create_connection((address, port), CONNECT_SECONDS) as connection:
            connection.settimeout(_SECONDS)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.sendall(token)
            round_trips = []
            for _ in range(_PINGS):
                started = time.perf_counter()
                connection.sendall(b".")
                _receive(connection, 1)
                round_trips.append(time.perf_counter() - started)
            block = bytes(2**20)
            started = time.perf_counter()
            for _ in range(_BULK_BYTES // len(block)):
                connection.sendall(block)
            _receive(connection, 1)
            bandwidth = _BULK_BYTES / (time.perf_counter() - started)
            return LinkMeasurement(sorted(round_trips)[_PINGS // 2] / 2, bandwidth)
    except OSError as error:
        raise LaunchError(f"{address}:{port} can't be reached ({error}); is a firewall on?") from None


def _receive_some(connection: socket.socket, at_most: int) -> bytes:
    data = connection.recv(min(at_most, 2**20))
    if not data:
        raise ConnectionError("ended")
    return data


def _receive(connection: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        data += _receive_some(connection, count - len(data))
    return bytes(data)


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
        measurement = measure(argv[1], int(argv[2]), token)
    except LaunchError as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps({"latency": measurement.latency, "bandwidth": measurement.bandwidth}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
