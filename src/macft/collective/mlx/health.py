"""Reports to the other ranks, on a port of its own, what this rank is doing, and asks them the same.

MLX's communication waits forever and does not report which rank it waits for. The health server answers from a thread,
so a rank that computes still answers. A stopped process is silent, and an ended one refuses the connection.
"""

from __future__ import annotations

import contextlib
import hashlib
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass

import msgpack

from macft.collective.wire import split_address
from macft.errors import CollectiveError

_MAX_BYTES = 4096
_MAX_TEXT = 400
_ANSWER_SECONDS = 1.0
_RETRY_SECONDS = 0.01


@dataclass
class Health:
    """What a rank is doing. The order of the fields is that on the wire."""

    rank: int = 0
    # Number of operations begun.
    operation: int = 0
    # The current call in words: "all-reduce 5 of 1024 bytes"; empty between two calls.
    call: str = ""
    # Since the current operation began.
    seconds: float = 0.0
    # Why this rank gives up, once it does.
    reason: str = ""


class HealthServer:
    """Answers every connection to ``address`` ("host:port", port 0 for a free one) with the result of ``read``.

    Raises:
        CollectiveError: the address cannot be listened on.
    """

    def __init__(self, address: str, read: Callable[[], Health]):
        host, port = split_address(address)
        try:
            family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
            self._server = socket.create_server((host, port), family=family)
        except OSError as error:
            raise CollectiveError(f"can't listen on {address}: {error}; does another run use the port?") from None
        self.address = f"{address.rpartition(':')[0]}:{self._server.getsockname()[1]}"
        self.secret = ""
        """The run's secret. Never sent; only its hash is, to identify ranks of the same run."""
        self._read = read
        self._is_closed = False
        self._thread = threading.Thread(target=self._serve, name="health", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Frees the port. Safe to call twice."""
        if not self._is_closed:
            self._is_closed = True
            # Closing alone does not wake the thread on every system.
            with contextlib.suppress(OSError):  # macOS: "not connected"; there closing does wake it
                self._server.shutdown(socket.SHUT_RDWR)
            self._server.close()
            self._thread.join(_ANSWER_SECONDS)

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:  # the other side has gone already, or there are too many open files; or this is closed
                if self._is_closed:
                    return
                time.sleep(_RETRY_SECONDS)
                continue
            with connection:
                try:
                    connection.settimeout(_ANSWER_SECONDS)
                    connection.sendall(msgpack.packb([_run_mark(self.secret), *astuple(self._read())]))
                except OSError:
                    continue


def ask(address: str, secret: str) -> Health | str:
    """A rank's health, or why there is none: ``ended``, ``silent``, ``unreachable`` or ``strange``."""
    deadline = time.monotonic() + _ANSWER_SECONDS
    data = b""
    try:
        with socket.create_connection(split_address(address), timeout=_ANSWER_SECONDS) as connection:
            while len(data) <= _MAX_BYTES and (part := connection.recv(_MAX_BYTES)):
                data += part
                connection.settimeout(max(0.01, deadline - time.monotonic()))
    except (ConnectionRefusedError, ConnectionResetError):
        return "ended"
    except TimeoutError:
        return "silent"
    except OSError:
        return "unreachable"
    return _parse(data, secret) if data else "ended"


def _run_mark(secret: str) -> bytes:
    return hashlib.sha256(f"pulse {secret}".encode()).digest()[:16]


def _parse(data: bytes, secret: str) -> Health | str:
    try:
        values: object = msgpack.unpackb(data)
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException):
        return "strange"
    match values:
        case [bytes(mark), int(rank), int(operation), str(call), float(seconds), str(reason)]:
            if mark != _run_mark(secret) or isinstance(rank, bool) or isinstance(operation, bool):
                return "strange"
            return Health(rank, operation, call[:_MAX_TEXT], seconds, reason[:_MAX_TEXT])
    return "strange"
