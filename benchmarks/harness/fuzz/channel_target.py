"""A channel between two ranks under attack by somebody who knows its secret."""

from __future__ import annotations

import select
import threading
import time
from functools import partial

import numpy as np

from harness.fuzz.answer import SECONDS, Answer, wait_for
from macft.collective.ring.channels import _Incoming, _Outgoing
from macft.collective.ring.stream import StreamIn, StreamOut, StreamPort
from macft.collective.wire import Header, Kind, pack

PIECE_BYTES = 4096
_HEADER = Header(Kind.MESSAGE, 0, 0)


def accepted(port: StreamPort, piece_bytes: int) -> StreamIn:
    """The stream of the next sender that ``port`` lets in."""
    stream = None
    while stream is None:
        select.select(port.sockets, [], [], 0.05)
        stream = port.accept(piece_bytes)
    return stream


class ChannelTarget:
    """A rank's end of the channel from rank 0. It ends with each sender, and another one is opened."""

    def __init__(self, *, encrypted: bool):
        self._encrypted, self._done, self.refused = encrypted, 0, 0
        self._messages: list[tuple[int, bytes]] = []
        self._port = StreamPort("127.0.0.1", encrypted=encrypted)
        self._generation = 0
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            channel = _Incoming(accepted(self._port, PIECE_BYTES), 0, 0, "rank 0")
            while not channel.has_ended:
                if (message := channel.take(0.05)) is not None:
                    self._messages = [*self._messages[-9:], (message[0], bytes(message[1]))]
            self.refused += bool(channel.refusal)
            channel.close()
            self._port = StreamPort("127.0.0.1", encrypted=self._encrypted)
            self._generation += 1

    def open(self) -> Answer:
        body = _HEADER._replace(sequence=7, total=6000, piece=0, length=PIECE_BYTES)
        rest = body._replace(piece=1, length=6000 - PIECE_BYTES)
        port = self._port
        return Answer(
            addresses=[f"127.0.0.1:{port.port}"],
            valid=[pack(header).hex() for header in (body, rest, _HEADER._replace(sequence=8))],
            server=port.secret.hex(),
        )

    def check(self) -> Answer:
        """A message of rank 0 arrives."""
        self._done += 1
        deadline = time.monotonic() + SECONDS
        body = np.random.default_rng(self._done).integers(0, 256, 10_000, np.uint8).tobytes()
        while time.monotonic() < deadline:
            port, before = self._port, self._generation
            out = StreamOut.connect("127.0.0.1:1", port.port, port.secret, PIECE_BYTES, encrypted=self._encrypted)
            if out is None:  # the attacker's channel has not ended yet
                time.sleep(0.01)
                continue
            sender = _Outgoing(out, _HEADER, PIECE_BYTES)
            sender.send(self._done, memoryview(body))
            is_sent = sender.drain(SECONDS)
            sender.close()
            if is_sent and wait_for(partial(self._has_ended_since, before)) and (self._done, body) in self._messages:
                return Answer(done=self._done, notes={"refused, as it must be": self.refused})
        return Answer(wrong="a message of rank 0 does not arrive", done=self._done)

    def _has_ended_since(self, generation: int) -> bool:
        return self._generation > generation
