"""All paths to the right neighbour: which frame goes which way, and what goes again when a path is lost."""

from __future__ import annotations

import operator
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from macft.collective.listener import Listener
from macft.collective.path import SendPath
from macft.collective.wire import Header

_STALL_SECONDS = 1.0
"""A path whose oldest frame is this late is tried out: the same frame goes over another path."""
_is_pending = operator.attrgetter("pending")


class MultipathSender:
    """Sends each frame over the path that would have it across soonest, by measured speed."""

    def __init__(self, listener: Listener, endpoints: Sequence[str]):
        self.paths = [SendPath(listener, endpoint, alone=len(endpoints) == 1) for endpoint in endpoints]
        self.lost: list[str] = []
        """Endpoints of paths that broke while others carried on."""
        self._again: deque[tuple[Header, Any]] = deque()

    @property
    def pending(self) -> bool:
        """Whether a stream still has to send what it was given."""
        return any(map(_is_pending, self.paths))

    @property
    def unacknowledged(self) -> int:
        """Frames that the neighbour is not known to have taken, where that has to be known."""
        return len(self._again) + sum(len(path.sent) for path in self.paths if not path.lost)

    def send(self, header: Header, body: Any) -> bool:
        """Sends a frame if it may go now, and says whether it did.

        A large ``body`` must not change while it is ``pending`` or ``unacknowledged``.
        """
        path = self._best(header.length)
        if path is None or not path.has_room:
            return False
        path.send(header, body)
        return True

    def flush(self) -> int:
        """Lets streams send what the network takes; returns how many bytes that was."""
        return sum(path.stream.flush() for path in self.paths if path.stream is not None and path.pending)

    def lose(self, path: SendPath) -> None:
        """Gives up a path; what it has not delivered goes another way, if there is one."""
        if path.lost:
            return
        path.lost = True
        if path.stream is not None:
            path.stream.close()
        if any(other.usable for other in self.paths):
            self.lost.append(path.endpoint)
            self._again.extend((sent.header, sent.body) for sent in path.sent if sent.header is not None)
            path.sent.clear()

    def lose_broken(self, latest: float) -> None:
        """Gives up paths whose stream has ended before ``latest``."""
        for path in self.paths:
            if path.stream is not None and path.stream.broken_at is not None and path.stream.broken_at < latest:
                self.lose(path)

    def send_again(self) -> bool:
        """Sends what lost paths have not delivered, as far as it may go now; False if there is nothing."""
        if not self._again:
            return False
        while self._again and self.send(*self._again[0]):
            self._again.popleft()
        return True

    def try_out_stalled(self) -> None:
        """A path that carries nothing while another one does is lost, long before its heartbeats tell."""
        now = time.monotonic()
        for path in self.paths:
            others = [other for other in self.paths if other is not path and other.usable]
            if not others or not path.sent or path.lost or now - path.sent[0].at < _STALL_SECONDS:
                continue
            if path.probed and any(other.last_credit > path.sent[0].at + _STALL_SECONDS for other in others):
                self.lose(path)
            elif not path.probed and (free := [other for other in others if other.has_room]):
                oldest = path.sent[0]
                assert oldest.header is not None
                free[0].send(oldest.header, oldest.body)
                path.probed = True

    def _best(self, size: int) -> SendPath | None:
        if len(self.paths) == 1:
            return self.paths[0] if self.paths[0].usable else None
        usable = [path for path in self.paths if path.usable]
        return min(usable, key=lambda path: path.finish_time(size), default=None)
