"""A small HTTP server of this machine: where it listens, how many it serves at a time, and whom."""

from __future__ import annotations

import hmac
import ipaddress
import secrets
import socket
import threading
from http.server import ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any

from macft.errors import LaunchError

_KEY_BYTES = 24


class HttpServer(ThreadingHTTPServer):
    """Listens at once, with a thread for each connection; more than ``connections`` at a time are closed.

    Args:
        host: Address or name to listen at.
        port: 0 takes a free one.
        handler: Makes what answers a connection, a ``BaseHTTPRequestHandler``.
        connections: Most at a time.

    Raises:
        LaunchError: the address can't be listened on.
    """

    daemon_threads = True
    request_queue_size = 128  # with 5, a client that comes with others at once waits for seconds

    def __init__(self, host: str, port: int, handler: Any, *, connections: int):
        self._free = threading.Semaphore(connections)
        try:
            family, _, _, _, address = socket.getaddrinfo(
                host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            self.address_family = family
            super().__init__((str(address[0]), int(address[1])), handler)
        except OSError as error:
            why = error.strerror or error
            raise LaunchError(
                f"--host: can't listen at {host} port {port} ({why}); end what uses it, or give another --port"
            ) from None

    @property
    def url(self) -> str:
        """Where clients find it."""
        return url_of(self.server_name, self.server_port)

    def server_bind(self) -> None:
        """Binds without the look-up of this machine's full name, which can take long."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def process_request(self, request: Any, client_address: Any) -> None:
        """Begins to answer a connection, unless there are too many: that one is closed."""
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # no more threads
            self._free.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answers a connection, in its thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that breaks concerns its client only."""


def url_of(host: str, port: int) -> str:
    """The address of a server as a browser takes it."""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether only programs on this machine reach ``host``."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def name_in(host_header: str) -> str:
    """The name in a ``Host`` header, without the port."""
    if host_header.startswith("[") and "]" in host_header:
        return host_header[: host_header.index("]") + 1]
    return host_header.partition(":")[0]


def new_key() -> str:
    """A random key for a server."""
    return secrets.token_urlsafe(_KEY_BYTES)


def is_key(given: str, key: str) -> bool:
    """Whether ``given`` is ``key``, in a time that does not depend on how much of it is right."""
    return hmac.compare_digest(given.encode("utf-8", "surrogateescape"), key.encode())
