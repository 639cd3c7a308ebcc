"""The collective of an elastic run: a ring that is made anew, with whoever is there, when a node is lost or joins."""

from __future__ import annotations

import contextlib
import hashlib
import secrets
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, Self

import msgpack
import numpy as np
from numpy.typing import NDArray

from macft.collective.base import Collective
from macft.collective.codecs.wire_codec import WireCodec
from macft.collective.elastic import ElasticCollective, MembershipView
from macft.collective.listener import Listener
from macft.collective.ring import Ring
from macft.collective.solo import Solo
from macft.errors import CollectiveError, MembershipChanged, PeerLost, PeerTimeout
from macft.logs.run_log import log_context
from macft.membership import heartbeats
from macft.membership.paxos import View
from macft.membership.service import MembershipService

_MOST_TRIES = 10
"""Rings of the same nodes that may fail one after the other before they are given up."""


class ElasticRing(ElasticCollective):
    """The :class:`~macft.collective.elastic.ElasticCollective` of the members that there are just now.

    When the ring breaks, or the nodes have agreed to let one in, calls raise MembershipChanged, and :meth:`regroup`
    makes the next ring. Rank and world size are then others.

    Args:
        ring: Of the members of ``view``; a newcomer, which is not in it yet, is alone in a
        :class:`~macft.collective.solo.Solo`.
        open_listener: Opens the port of the next ring.
        secret: Of the run.
    """

    def __init__(
        self,
        membership: MembershipService,
        ring: Collective,
        view: View,
        *,
        secret: bytes,
        open_listener: Callable[[], Listener],
    ):
        self._membership, self._ring, self._view = membership, ring, view
        self._secret, self._open = secret, open_listener
        self._sent = 0
        self._is_in = membership.seat.id in view.ids
        self._update_log_context()
        membership.begin(view, secret)

    @classmethod
    def of_ring(
        cls, ring: Collective, membership: MembershipService, open_listener: Callable[[], Listener]
    ) -> ElasticRing:
        """The team of all ranks of a ring that has just come together. A call of all ranks."""
        seats = tuple(
            heartbeats.to_member_record(msgpack.unpackb(blob))
            for blob in ring.all_gather(msgpack.packb(list(membership.seat)))
        )
        secret = ring.broadcast(secrets.token_bytes(16))
        return cls(membership, ring, View(0, seats), secret=secret, open_listener=open_listener)

    @property
    def members(self) -> MembershipView:
        """Who takes part now; the generation counts the rings of the run from 0."""
        names = tuple(seat.name for seat in self._view.seats)
        addresses = tuple(seat.address for seat in self._view.seats)
        return MembershipView(self._view.generation, self._view.ids, names, addresses, dict(self._membership.why))

    @property
    def is_member(self) -> bool:
        """False for a newcomer that has not regrouped yet, or one that has stepped out."""
        return self._is_in

    @property
    def wants_change(self) -> bool:
        """Whether a node is at the door, so that all should regroup after this step."""
        return bool(self._membership.candidates)

    def check(self) -> None:
        """Costs nothing; raises MembershipChanged where the ring is known not to go on."""
        if reason := self._membership.disturbed:
            raise MembershipChanged(reason)

    def regroup(self, waiting: Callable[[str], bool]) -> bool:
        """Leaves the ring and joins the next one, with those who are there."""
        self.step_out()
        for _ in range(_MOST_TRIES):
            listener = self._open()
            key = b"" if listener.security is None else listener.security.public_key
            try:
                view = self._membership.next_view(listener.address, key, after=self._view.generation, waiting=waiting)
            except BaseException:
                listener.close()
                raise
            if view is None:
                listener.close()
                return False
            self._view = view
            self._update_log_context()
            try:
                self._ring = self._join(view, listener)
            except CollectiveError as error:
                failure = error
                continue
            self._is_in = True
            return True
        raise failure

    def _update_log_context(self) -> None:
        ids, own = self._view.ids, self._membership.seat.id
        log_context.update(rank=ids.index(own) if own in ids else None, generation=self._view.generation)

    def step_out(self) -> None:
        """Leaves the ring. Until it has regrouped this node is by itself, like a newcomer."""
        self._sent += self._ring.bytes_sent
        self._ring.close()
        self._ring, self._is_in = Solo(), False

    def _join(self, view: View, listener: Listener) -> Collective:
        rank = view.ids.index(self._membership.seat.id)
        if len(view.seats) == 1:
            listener.close()
            return Solo()
        if listener.security is not None:
            listener.security.meet([seat.ring_key for seat in view.seats], rank)
        ring = Ring(
            rank,
            len(view.seats),
            [seat.ring for seat in view.seats],
            listener,
            names=[seat.name for seat in view.seats],
            ring_id=hashlib.sha256(self._secret + b"%d" % view.generation).hexdigest()[:32],
            generation=view.generation,
            abandon=lambda: self._membership.disturbed if self._membership.view == view else "",
        )
        try:
            ring.tune()
        except CollectiveError:
            ring.close()
            raise
        return ring

    @property
    def rank(self) -> int:
        """This node's place among the members."""
        return self._ring.rank

    @property
    def world_size(self) -> int:
        """How many members there are."""
        return self._ring.world_size

    @property
    def bytes_sent(self) -> int:
        """Bytes of data this node has sent so far, in all rings."""
        return self._sent + self._ring.bytes_sent

    @property
    def lost_paths(self) -> list[str]:
        """As the ring's."""
        return self._ring.lost_paths

    def all_reduce(self, arrays: Sequence[Any]) -> None:
        """As the ring's, or raises MembershipChanged."""
        with _as_change():
            self._ring.all_reduce(arrays)

    def all_reduce_coded(self, array: NDArray[np.float32], codec: WireCodec, residual: NDArray[np.float32]) -> None:
        """As the ring's, or raises MembershipChanged."""
        with _as_change():
            self._ring.all_reduce_coded(array, codec, residual)

    def broadcast(self, payload: bytes, root: int = 0) -> bytes:
        """As the ring's, or raises MembershipChanged."""
        with _as_change():
            return self._ring.broadcast(payload, root)

    def all_gather(self, payload: bytes) -> list[bytes]:
        """As the ring's, or raises MembershipChanged."""
        with _as_change():
            return self._ring.all_gather(payload)

    def barrier(self) -> None:
        """As the ring's, or raises MembershipChanged."""
        with _as_change():
            self._ring.barrier()

    def close(self) -> None:
        """Leaves the ring, then the members. Safe to call twice."""
        self._ring.close()
        self._membership.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ring.__exit__(kind, error, trace)
        self._membership.close()


@contextlib.contextmanager
def _as_change() -> Iterator[None]:
    try:
        yield
    except (PeerLost, PeerTimeout) as error:
        raise MembershipChanged(str(error)) from error
