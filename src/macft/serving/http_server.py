"""The server's socket and its end."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from functools import partial
from http.server import ThreadingHTTPServer
from typing import Any

from macft.errors import LaunchError
from macft.serving.engine import Engine
from macft.serving.handler import Handler
from macft.serving.options import ServerConfig

_MAX_CONNECTIONS = 128


class Server(ThreadingHTTPServer):
    """Listens, with a thread for each connection.

    Raises:
        LaunchError: the address can't be listened on.
    """

    daemon_threads = True
    request_queue_size = _MAX_CONNECTIONS
    """Clients that may wait for the accepting thread; more would try again after a second."""

    def __init__(self, config: ServerConfig):
        self._config = config
        self._free = threading.Semaphore(_MAX_CONNECTIONS)
        try:
            family, _, _, _, address = socket.getaddrinfo(
                config.host.strip("[]"), config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            self.address_family = family
            super().__init__((str(address[0]), int(address[1])), Handler)
        except OSError as error:
            why = error.strerror or error
            raise LaunchError(
                f"--host: can't listen at {config.host} port {config.port} ({why}); end what uses it, or give another "
                "--port"
            ) from None

    @property
    def url(self) -> str:
        """Where clients find it."""
        host, port = self.server_address[:2]
        name = str(host) if ":" not in str(host) else f"[{host!s}]"
        return f"http://{name}:{port}"

    def serve(self, engine: Engine, ready: Callable[[], None]) -> None:
        """Answers until Ctrl-C, which raises KeyboardInterrupt here; ``ready`` is called when it begins.

        Returns if the engine can't go on.
        """
        self.RequestHandlerClass = partial(Handler, engine, self._config)
        engine.on_failure = self.shutdown
        ready()
        self.serve_forever(poll_interval=0.1)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Begins to answer a connection, unless there are too many: that one is closed."""
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answers a connection, in its thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that breaks concerns its client only."""
