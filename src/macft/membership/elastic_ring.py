"""The collective of an elastic run: a ring that is formed again by all reachable nodes when one is lost or joins."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import secrets
from collections.abc import Callable, Collection, Iterator, Sequence
from types import TracebackType
from typing import Self

import msgpack
import numpy as np
from numpy.typing import NDArray

from macft.collective.base import Channels, Collective, ReducibleArray, RingSpeed
from macft.collective.codecs.quantization import WireCodec
from macft.collective.elastic import ElasticCollective, MembershipView
from macft.collective.matching import Texts
from macft.collective.ring.listener import Listener
from macft.collective.ring.ring import Ring
from macft.collective.solo import Solo
from macft.errors import CollectiveError, MembershipChanged, PeerLost, PeerTimeout
from macft.logs.run_log import log_context
from macft.membership import heartbeat_codec
from macft.membership.paxos import View
from macft.membership.service import MembershipService

_MAX_ATTEMPTS = 10
"""Rings that may fail to form, one after the other, before `regroup` gives up."""
_log = logging.getLogger("macft.ring")


class ElasticRing(ElasticCollective):
    """The :class:`~macft.collective.elastic.ElasticCollective` of the current members.

    When the ring fails, or another node has left it to let one join, calls raise MembershipChanged. :meth:`regroup`
    then forms the next ring; rank and world size may change.

    Args:
        membership: This node's membership service, which the elastic ring starts and owns.
        ring: The ring of the members of ``view``. A newcomer, which is not in the view, passes a
            :class:`~macft.collective.solo.Solo`.
        view: The newest view.
        secret: Known to the members of the run only.
        open_listener: Opens the ports of the next ring.
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
        self._secret, self._open_listener = secret, open_listener
        self._bytes_sent_before = 0
        self._is_member = membership.own.id in view.ids
        self._update_log_context()
        membership.start(view, secret)

    @classmethod
    def from_ring(
        cls, ring: Collective, membership: MembershipService, open_listener: Callable[[], Listener]
    ) -> ElasticRing:
        """The elastic ring of all ranks of ``ring``. A collective call: all ranks make it."""
        members = tuple(
            heartbeat_codec.decode_member(msgpack.unpackb(blob))
            for blob in ring.all_gather(msgpack.packb(list(membership.own)))
        )
        secret = ring.broadcast(secrets.token_bytes(16))
        return cls(membership, ring, View(0, members), secret=secret, open_listener=open_listener)

    @property
    def members(self) -> MembershipView:
        """The current members; the generation counts the rings of the run from 0."""
        view = self._view
        addresses = tuple(member.address for member in view.members)
        return MembershipView(view.generation, view.ids, view.names, addresses, dict(self._membership.state.departures))

    @property
    def is_member(self) -> bool:
        """False for a newcomer that has not regrouped yet, and for a node that has left."""
        return self._is_member

    @property
    def wants_change(self) -> bool:
        """Whether a node waits to join, so that all ranks should regroup after this step."""
        return bool(self._membership.state.candidates)

    @property
    def stop_wanted(self) -> bool:
        """Whether any member's user wants, or wanted, the run to stop."""
        return self._membership.state.stop_wanted

    def tell_stop(self, wanted: Callable[[], bool]) -> None:
        """Tells the others as soon as ``wanted()``, which is called in another thread, is true."""
        self._membership.wants_stop = wanted

    @property
    def started(self) -> str:
        """When the run started, as all members have it; a newcomer takes it over."""
        return self._membership.started

    @property
    def contents(self) -> Texts:
        """What all members' data and weights are; a newcomer has them from the run. Empty until they are known."""
        return self._membership.contents

    @contents.setter
    def contents(self, value: Texts) -> None:
        self._membership.contents = value

    def check(self) -> None:
        """Raises MembershipChanged if the ring is known to have failed. No communication."""
        if reason := self._membership.state.ring_failure:
            raise MembershipChanged(reason)

    def regroup(self, waiting: Callable[[str], bool]) -> bool:
        """Leaves the ring and forms the next one with all reachable members.

        See :meth:`~macft.collective.elastic.ElasticCollective.regroup`.
        """
        self.step_out()
        for attempt in range(1, _MAX_ATTEMPTS + 1):
            listener = self._open_listener()
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
                self._ring = self._form_ring(view, listener)
            except CollectiveError as error:
                failure = error
                _log.warning("ring of generation %d did not form (attempt %d): %s", view.generation, attempt, error)
                continue
            self._is_member = True
            return True
        raise failure

    def _update_log_context(self) -> None:
        ids, own = self._view.ids, self._membership.own.id
        log_context.update(rank=ids.index(own) if own in ids else None, generation=self._view.generation)

    def step_out(self) -> None:
        """Leaves the ring. Until it regroups, this node is alone, like a newcomer."""
        self._bytes_sent_before += self._ring.bytes_sent
        self._ring.close()
        self._ring, self._is_member = Solo(), False

    def _failure_of(self, view: View) -> str:
        """Why the ring of ``view`` can't form; empty if it can, or if the members have changed since."""
        state = self._membership.state
        return state.ring_failure if state.view == view else ""

    def _form_ring(self, view: View, listener: Listener) -> Collective:
        rank, members = view.ids.index(self._membership.own.id), view.members
        if len(members) == 1:
            listener.close()
            _log.info("generation %d has one member; no ring is needed", view.generation)
            return Solo()
        if listener.security is not None:
            listener.security.meet([member.ring_key for member in members], rank)
        ring = Ring(
            rank,
            len(members),
            [member.ring for member in members],
            listener,
            names=view.names,
            ring_id=hashlib.sha256(self._secret + b"%d" % view.generation).hexdigest()[:32],
            generation=view.generation,
            stop_reason=lambda: self._failure_of(view),
        )
        try:
            ring.tune()
        except CollectiveError:
            ring.close()
            raise
        return ring

    @property
    def rank(self) -> int:
        """This node's rank among the members."""
        return self._ring.rank

    @property
    def world_size(self) -> int:
        """The number of members."""
        return self._ring.world_size

    @property
    def bytes_sent(self) -> int:
        """Bytes of data this node has sent so far, in all rings."""
        return self._bytes_sent_before + self._ring.bytes_sent

    @property
    def lost_paths(self) -> list[str]:
        """See :class:`~macft.collective.ring.ring.Ring`."""
        return self._ring.lost_paths

    @property
    def speed(self) -> RingSpeed | None:
        """See :class:`~macft.collective.ring.ring.Ring`."""
        return self._ring.speed

    def all_reduce(self, arrays: Sequence[ReducibleArray]) -> None:
        """See :class:`~macft.collective.ring.ring.Ring`; raises MembershipChanged if a rank is lost."""
        with _as_membership_change():
            self._ring.all_reduce(arrays)

    def all_reduce_coded(self, array: NDArray[np.float32], codec: WireCodec, residual: NDArray[np.float32]) -> None:
        """See :class:`~macft.collective.ring.ring.Ring`; raises MembershipChanged if a rank is lost."""
        with _as_membership_change():
            self._ring.all_reduce_coded(array, codec, residual)

    def broadcast(self, payload: bytes, root: int = 0) -> bytes:
        """See :class:`~macft.collective.ring.ring.Ring`; raises MembershipChanged if a rank is lost."""
        with _as_membership_change():
            return self._ring.broadcast(payload, root)

    def all_gather(self, payload: bytes) -> list[bytes]:
        """See :class:`~macft.collective.ring.ring.Ring`; raises MembershipChanged if a rank is lost."""
        with _as_membership_change():
            return self._ring.all_gather(payload)

    def barrier(self) -> None:
        """See :class:`~macft.collective.ring.ring.Ring`; raises MembershipChanged if a rank is lost."""
        with _as_membership_change():
            self._ring.barrier()

    def open_channels(self, pairs: Collection[tuple[int, int]], purpose: str) -> Channels:
        """See :class:`~macft.collective.base.Collective`; they raise MembershipChanged if a rank is lost.

        They end with the ring of this generation.
        """
        with _as_membership_change():
            channels = self._ring.open_channels(pairs, purpose)
        return channels.guard(self.check, _as_membership_change)

    def tell_stopped(self) -> None:
        """The others know it from this node's heartbeats; see :meth:`tell_stop`."""

    def close(self) -> None:
        """Closes the ring, then the membership service. Safe to call twice."""
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
def _as_membership_change() -> Iterator[None]:
    try:
        yield
    except (PeerLost, PeerTimeout) as error:
        raise MembershipChanged(str(error)) from error
