"""TCP forwarders that stand for the cables between machines."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from collections.abc import Iterator

from macft.collective.ring.listener import Listener
from macft.collective.settings import CollectiveConfig
from macft.collective.wire import split_paths

PIECE = 64 * 1024


class Cable:
    """A TCP forwarder in front of a port: counts what it carries, can be slow, silent or cut."""

    def __init__(self, target: str):
        self._target = target.rpartition(":")
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._server.getsockname()[1]}"
        self.carried = 0
        self.bytes_per_second = float("inf")
        self.silent = threading.Event()
        self._ends: list[socket.socket] = []
        self._is_cut = False
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def cut(self) -> None:
        """Both ends see the connection break."""
        self._is_cut = True
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.cut()
        for thread in self._threads:
            thread.join()
        for end in self._ends:
            end.close()

    def _accept(self) -> None:
        while not self._is_cut:
            try:
                near, _ = self._server.accept()
                far = socket.create_connection((self._target[0], int(self._target[2])))
            except OSError:
                return
            self._ends += [near, far]
            thread = threading.Thread(target=self._carry, args=(near, far), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _carry(self, near: socket.socket, far: socket.socket) -> None:
        other = {near: far, far: near}
        while not self._is_cut:
            for end in select.select([near, far], [], [], 0.05)[0]:
                if self.silent.is_set():
                    time.sleep(0.01)  # a cable that swallows everything, and nobody is told
                    continue
                try:
                    data = end.recv(65_536)
                    other[end].sendall(data)
                except OSError:
                    data = b""
                if not data:
                    for each in (near, far):
                        with contextlib.suppress(OSError):
                            each.shutdown(socket.SHUT_RDWR)
                    return
                self.carried += len(data)
                time.sleep(len(data) / self.bytes_per_second)


@contextlib.contextmanager
def two_cables(world_size: int) -> Iterator[tuple[list[Listener], list[str], list[list[Cable]]]]:
    """Listeners with two paths each, addresses that lead over cables, and the cables by rank they lead to."""
    settings = CollectiveConfig(piece_bytes=PIECE, timeout=20.0, streams=False)  # they would go past the cables
    listeners = [Listener("127.0.0.1:0+127.0.0.1:0", settings) for _ in range(world_size)]
    cables = [[Cable(path) for path in split_paths(listener.address)] for listener in listeners]
    try:
        yield listeners, ["+".join(cable.address for cable in pair) for pair in cables], cables
    finally:
        for pair in cables:
            for cable in pair:
                cable.close()
