"""The server's socket and its end."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from macft.network.http_server import HttpServer
from macft.serving.engine import Engine
from macft.serving.handler import Handler
from macft.serving.options import ServerConfig

_MAX_CONNECTIONS = 128


class Server(HttpServer):
    """Listens, with a thread for each connection.

    Raises:
        LaunchError: the address can't be listened on.
    """

    def __init__(self, config: ServerConfig):
        self._config = config
        super().__init__(config.host, config.port, Handler, connections=_MAX_CONNECTIONS)

    def serve(self, engine: Engine, ready: Callable[[], None]) -> None:
        """Answers until Ctrl-C, which raises KeyboardInterrupt here; ``ready`` is called when it begins.

        Returns if the engine can't go on.
        """
        self.RequestHandlerClass = partial(Handler, engine, self._config)
        engine.on_failure = self.shutdown
        ready()
        self.serve_forever(poll_interval=0.1)
