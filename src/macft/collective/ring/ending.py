"""How a ring ends: what a neighbour did or said becomes this rank's error, and both neighbours are told."""

from __future__ import annotations

import logging
from typing import NoReturn, TypeAlias

from macft.collective.ring.departure import Departure
from macft.collective.ring.handshake import PROBE_SECONDS, RingIdentity
from macft.collective.wire import MAX_TEXT, Cause, Header, Kind, probe, split_paths, unpack
from macft.errors import CollectiveError, PeerLost, PeerStopped, PeerTimeout, ProtocolError

Failure: TypeAlias = type[PeerLost] | type[PeerTimeout] | type[ProtocolError]

_CAUSE_OF: dict[Failure, Cause] = {
    PeerLost: Cause.LOST,
    PeerTimeout: Cause.TIMEOUT,
    ProtocolError: Cause.PROTOCOL,
    PeerStopped: Cause.STOPPED,
}
_FAILURE_OF: dict[int, Failure] = {Cause.DONE: PeerLost, **{cause: kind for kind, cause in _CAUSE_OF.items()}}
_log = logging.getLogger("macft.ring")


class Ending:
    """Raises the error that ends a ring, after telling both neighbours why.

    Args:
        ring: Which ring, and this rank's position in it.
        departure: Sends the goodbyes.
        timeout: Seconds after which a silent neighbour is given up; for messages.

    Attributes:
        failure: The error that ended the ring; None while it works.
    """

    def __init__(self, ring: RingIdentity, departure: Departure, timeout: float):
        self.failure: CollectiveError | None = None
        self._ring, self._departure, self._timeout = ring, departure, timeout

    def fail(self, kind: Failure, culprit: int, text: str) -> NoReturn:
        """Ends the ring: tells both neighbours that rank ``culprit`` is to blame, and raises."""
        self.failure = kind(text)
        _log.warning("ring ended (%s): %s", kind.__name__, text)
        self.say_goodbye(_CAUSE_OF[kind], culprit, text)
        raise self.failure

    def say_goodbye(self, cause: Cause, culprit: int, text: str) -> None:
        """Tells both neighbours that this rank leaves, except one that is gone. Never blocks."""
        self._departure.say_goodbye(
            self._ring.header(Kind.GOODBYE)._replace(cause=cause, culprit=culprit, text=text[:MAX_TEXT])
        )

    def pass_on(self, goodbye: Header, call: object) -> NoReturn:
        """Ends the ring for the reason that a neighbour gave in its ``goodbye``."""
        text = goodbye.text or f"{self._ring.name(goodbye.sender)} left the ring during {call}"
        self.fail(_FAILURE_OF[goodbye.cause], goodbye.culprit, text)

    def unpack(self, data: bytes | memoryview, peer: int) -> Header:
        """The header ``data`` of the neighbour ``peer``; ends the ring if it is not one of this ring."""
        try:
            header = unpack(data, self._ring.name(peer))
        except ProtocolError as error:
            self.fail(ProtocolError, peer, str(error))
        is_refusal = header.kind == Kind.GOODBYE  # may be sent by a rank of another generation
        if not is_refusal and (header.sender, header.generation) != (peer, self._ring.generation):
            text = f"{self._ring.name(peer)} sent a frame of rank {header.sender}, generation {header.generation}"
            self.fail(ProtocolError, peer, f"{text}; this ring has generation {self._ring.generation}")
        return header

    def diagnose(self, peer: int, call: object) -> NoReturn:
        """Ends the ring because ``peer`` is gone: it ended, or it is stopped or unreachable. Both end connections."""
        states = [probe(path, PROBE_SECONDS) for path in split_paths(self._ring.addresses[peer])]
        state = next((known for known in ("alive", "ended") if known in states), states[0])
        name = self._ring.name(peer)
        if state in ("silent", "unreachable"):
            text = (
                f"{name} sent nothing for {self._timeout:g} s during {call}; it may be asleep, stopped or unreachable"
            )
            self.fail(PeerTimeout, peer, text)
        how = "the connection to it broke" if state == "alive" else "its process ended"
        self.fail(PeerLost, peer, f"{name} is gone: {how} during {call}")
