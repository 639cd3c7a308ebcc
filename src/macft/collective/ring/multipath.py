"""All paths to the right neighbour: which frame takes which path, and what is sent again when a path fails."""

from __future__ import annotations

import logging
import operator
import time
from collections import deque
from collections.abc import Sequence

from macft.collective.ring.listener import Listener
from macft.collective.ring.path import SendPath
from macft.collective.wire import Frame

_STALL_SECONDS = 1.0
"""If a path's oldest frame is this late, the same frame is sent over another path as a probe."""
_is_pending = operator.attrgetter("pending")
_log = logging.getLogger("macft.ring")


class MultipathSender:
    """Sends each frame over the path that should deliver it first, by measured speed."""

    def __init__(self, listener: Listener, endpoints: Sequence[str]):
        self.paths = [SendPath(listener, endpoint, is_only_path=len(endpoints) == 1) for endpoint in endpoints]
        self.lost: list[str] = []
        """Endpoints of paths that failed while others still worked."""
        self._resend: deque[Frame] = deque()

    @property
    def pending(self) -> bool:
        """Whether a stream has not sent all it was given."""
        return any(map(_is_pending, self.paths))

    @property
    def unacknowledged(self) -> int:
        """Frames that the neighbour may not have received, counted only where frames are acknowledged."""
        return len(self._resend) + sum(len(path.uncredited) for path in self.paths if not path.failed)

    def send(self, frame: Frame) -> bool:
        """Sends a frame if a path can take it now; returns whether it did.

        A large body must not change while it is ``pending`` or ``unacknowledged``.
        """
        path = self._fastest(frame.header.length)
        if path is None or not path.can_send:
            return False
        path.send(frame)
        return True

    def flush(self) -> int:
        """Lets streams send as much as the network accepts; returns the number of bytes sent."""
        return sum(path.stream.flush() for path in self.paths if path.stream is not None and path.pending)

    def lose(self, path: SendPath, reason: str) -> None:
        """Stops using a path; frames it has not delivered go over another one, if there is one."""
        if path.failed:
            return
        path.failed = True
        if path.stream is not None:
            path.stream.close()
        if any(other.usable for other in self.paths):
            self.lost.append(path.endpoint)
            self._resend.extend(sent.frame for sent in path.uncredited if sent.frame is not None)
            path.uncredited.clear()
            _log.warning("lost path to %s: %s; %d frames to send again", path.endpoint, reason, len(self._resend))
        else:
            _log.warning("lost the last path to the right neighbour, %s: %s", path.endpoint, reason)

    def lose_broken(self, deadline: float) -> None:
        """Stops using paths whose stream ended before ``deadline`` (``time.monotonic``)."""
        for path in self.paths:
            if path.stream is not None and path.stream.broken_at is not None and path.stream.broken_at < deadline:
                self.lose(path, "its stream ended")

    def resend(self) -> bool:
        """Sends again what lost paths have not delivered, as far as possible now; False if there is nothing."""
        if not self._resend:
            return False
        while self._resend and self.send(self._resend[0]):
            self._resend.popleft()
        return True

    def probe_stalled(self) -> None:
        """Finds paths that deliver nothing while another one does, long before their heartbeats time out."""
        now = time.monotonic()
        for path in self.paths:
            others = [other for other in self.paths if other is not path and other.usable]
            if not others or not path.uncredited or path.failed or now - path.uncredited[0].sent_at < _STALL_SECONDS:
                continue
            oldest = path.uncredited[0]
            if path.probed and any(other.last_credit > oldest.sent_at + _STALL_SECONDS for other in others):
                self.lose(path, "it delivers nothing while another path does")
            elif not path.probed and (free := [other for other in others if other.can_send]):
                assert oldest.frame is not None
                _log.info("path to %s is stalled; its oldest frame is sent over %s", path.endpoint, free[0].endpoint)
                free[0].send(oldest.frame)
                path.probed = True

    def _fastest(self, size: int) -> SendPath | None:
        if len(self.paths) == 1:
            return self.paths[0] if self.paths[0].usable else None
        usable = [path for path in self.paths if path.usable]
        return min(usable, key=lambda path: path.finish_time(size), default=None)
