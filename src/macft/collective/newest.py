"""Which rank has the newest state, and how all others get it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgpack

from macft.collective.base import Collective


@dataclass(frozen=True)
class Newest:
    """What :func:`find_newest` found: every rank's position, by rank, and the rank whose state counts."""

    collective: Collective
    positions: tuple[tuple[int, ...], ...]
    source: int

    @property
    def position(self) -> tuple[int, ...]:
        """The position of ``source``, the greatest of all."""
        return self.positions[self.source]

    def share(self, payload: Callable[[], bytes]) -> bytes:
        """The bytes that ``payload`` returns on ``source``, on every rank. A collective call."""
        own = payload() if self.collective.rank == self.source else b""
        return self.collective.broadcast(own, self.source)


def find_newest(collective: Collective, position: Sequence[int]) -> Newest:
    """Compares the ranks' positions; the greatest wins, and among equal ones the lowest rank. A collective call.

    ``position`` orders states: tuples of whole numbers of one length, compared from left to right. Raises as the
    collective does.
    """
    gathered = collective.all_gather(msgpack.packb(list(position)))
    positions = tuple(tuple(msgpack.unpackb(blob)) for blob in gathered)
    return Newest(collective, positions, positions.index(max(positions)))
