"""Tells the other ranks, on a port of its own, what this rank is doing, and asks them the same.

MLX's communication waits for ever and says nothing of whom it waits for. The pulse answers from a thread, so a rank
that computes answers too; one that is stopped is silent, and one that is gone refuses.
"""

from __future__ import annotations

import contextlib
import hashlib
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgpack

from macft.collective.wire import split_address
from macft.errors import CollectiveError

_MOST_BYTES = 4096
_MOST_TEXT = 400
_ANSWER_SECONDS = 1.0


@dataclass
class Health:
    """What a rank is doing. ``operation`` counts what it has begun; ``seconds`` are those since."""

    rank: int = 0
    operation: int = 0
    # In words: "all-reduce 5 of 1024 bytes"; empty between two calls.
    doing: str = ""
    seconds: float = 0.0
    # Why this rank gives up, once it does.
    reason: str = ""


class HealthServer:
    """Answers every connection to ``address`` ("host:port", port 0 for a free one) with what ``read`` returns.

    Raises:
        CollectiveError: the address can't be listened on.
    """

    def __init__(self, address: str, read: Callable[[], Health]):
        host, port = split_address(address)
        try:
            family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
            self._server = socket.create_server((host, port), family=family)
        except OSError as error:
            raise CollectiveError(f"can't listen on {address}: {error}; does another run use the port?") from None
        self.address = f"{address.rpartition(':')[0]}:{self._server.getsockname()[1]}"
        self.secret = ""  # of the run; told to nobody, but its hash shows who belongs together
        self._read = read
        self._thread = threading.Thread(target=self._serve, name="pulse", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Frees the port. Safe to call twice."""
        if self._server.fileno() >= 0:
            # Closing alone does not wake the thread on every system.
            with contextlib.suppress(OSError):  # macOS: "not connected"; there closing does wake it
                self._server.shutdown(socket.SHUT_RDWR)
            self._server.close()
            self._thread.join(_ANSWER_SECONDS)

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            with connection:
                try:
                    connection.settimeout(_ANSWER_SECONDS)
                    connection.sendall(msgpack.packb([_mark(self.secret), *vars(self._read()).values()]))
                except OSError:
                    continue


def ask(address: str, secret: str) -> Health | str:
    """A rank's pulse; or, in a word, why there is none: ``ended``, ``silent``, ``unreachable`` or ``strange``."""
    deadline = time.monotonic() + _ANSWER_SECONDS
    data = b""
    try:
        with socket.create_connection(split_address(address), timeout=_ANSWER_SECONDS) as connection:
            while len(data) <= _MOST_BYTES and (part := connection.recv(_MOST_BYTES)):
                data += part
                connection.settimeout(max(0.01, deadline - time.monotonic()))
    except (ConnectionRefusedError, ConnectionResetError):
        return "ended"
    except TimeoutError:
        return "silent"
    except OSError:
        return "unreachable"
    return _read(data, secret) if data else "ended"


def _mark(secret: str) -> bytes:
    return hashlib.sha256(f"pulse {secret}".encode()).digest()[:16]


def _read(data: bytes, secret: str) -> Health | str:
    try:
        values: Any = msgpack.unpackb(data)
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException):
        return "strange"
    kinds = (bytes, int, int, str, float, str)
    if not isinstance(values, list) or [type(value) for value in values] != list(kinds) or values[0] != _mark(secret):
        return "strange"
    values[3], values[5] = values[3][:_MOST_TEXT], values[5][:_MOST_TEXT]
    return Health(*values[1:])
