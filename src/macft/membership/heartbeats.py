"""Heartbeats as bytes: msgpack with every length limited. Anything but a valid heartbeat of this run is ignored.

Values from the wire have the type ``object`` until they have been checked.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeAlias

import msgpack

from macft.collective.security import KEY_BYTES
from macft.collective.wire import split_paths
from macft.membership.paxos import Ballot, Heartbeat, MemberRecord, View, Vote

MAX_BYTES = 65_536
_MAX_MEMBERS = 64
_MAX_TEXT = 255
_MAX_NUMBER = 1 << 62

PlainView: TypeAlias = list[object]
"""A view as msgpack sends it: ``[generation, [member, ...]]``."""


def encode(heartbeat: Heartbeat, secret: bytes) -> bytes:
    """``heartbeat`` as bytes, for the members of the run that shares ``secret``."""
    packed: bytes = msgpack.packb(
        [
            run_mark(secret),
            list(heartbeat.sender),
            plain_view(heartbeat.view),
            list(heartbeat.hears),
            heartbeat.ready,
            list(heartbeat.ballot) if heartbeat.ballot else None,
            _plain_vote(heartbeat.proposed),
            list(heartbeat.promised) if heartbeat.promised else None,
            _plain_vote(heartbeat.accepted),
        ]
    )
    return packed


def decode(data: bytes, secret: bytes) -> Heartbeat | None:
    """The inverse of :func:`encode`; None for anything else."""
    try:
        mark, sender, view, hears, ready, ballot, proposed, promised, accepted = _array(msgpack.unpackb(data))
        heard = _array(hears)
        if mark != run_mark(secret) or type(ready) is not bool or len(heard) > _MAX_MEMBERS:
            return None
        return Heartbeat(
            sender=member_from_plain(sender),
            view=view_from_plain(view),
            hears=tuple(_text(node) for node in heard),
            ready=ready,
            ballot=_ballot_from_plain(ballot),
            proposed=_vote_from_plain(proposed),
            promised=_ballot_from_plain(promised),
            accepted=_vote_from_plain(accepted),
        )
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException):
        return None


def run_mark(secret: bytes) -> bytes:
    """Identifies the members of a run without sending its secret."""
    return hashlib.sha256(b"membership " + secret).digest()[:16]


def member_from_plain(value: object) -> MemberRecord:
    """A member from msgpack's types. Raises ValueError or TypeError if it is not valid."""
    identity, name, address, key, ring, ring_key = _array(value)
    address, ring = _text(address), _text(ring)
    split_paths(address)
    if ring:
        split_paths(ring)
    return MemberRecord(_text(identity), _text(name), address, _key(key), ring, _key(ring_key))


def view_from_plain(value: object) -> View:
    """A view from msgpack's types. Raises ValueError or TypeError if it is not valid."""
    generation, members = _array(value)
    members = _array(members)
    if not 0 < len(members) <= _MAX_MEMBERS:
        raise ValueError("not a number of members")
    view = View(_number(generation), tuple(member_from_plain(member) for member in members))
    if len(set(view.ids)) != len(members):
        raise ValueError("a member is listed twice")
    return view


def plain_view(view: View) -> PlainView:
    """A view in msgpack's types."""
    return [view.generation, [list(member) for member in view.members]]


def _plain_vote(vote: Vote | None) -> list[object] | None:
    return None if vote is None else [list(vote.ballot), plain_view(vote.view)]


def _vote_from_plain(value: object) -> Vote | None:
    if value is None:
        return None
    plain_ballot, view = _array(value)
    ballot = _ballot_from_plain(plain_ballot)
    if ballot is None:
        raise ValueError("a vote without a ballot")
    return Vote(ballot, view_from_plain(view))


def _ballot_from_plain(value: object) -> Ballot | None:
    if value is None:
        return None
    number, proposer = _array(value)
    return Ballot(_number(number), _text(proposer))


def _array(value: object) -> Sequence[object]:
    if not isinstance(value, list):
        raise TypeError("not an array")
    return value


def _number(value: object) -> int:
    if type(value) is not int or not 0 <= value < _MAX_NUMBER:
        raise ValueError("not a number")
    return value


def _text(value: object) -> str:
    if type(value) is not str or len(value) > _MAX_TEXT or not value.isprintable():
        raise ValueError("not a text")
    return value


def _key(value: object) -> bytes:
    if type(value) is not bytes or len(value) not in (0, KEY_BYTES):
        raise ValueError("not a key")
    return value
