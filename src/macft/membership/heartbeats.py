"""Beats as bytes: msgpack with every length limited. What is not a proper beat of this run is nothing at all."""

from __future__ import annotations

import hashlib
from typing import Any

import msgpack

from macft.collective.security import KEY_BYTES
from macft.collective.wire import split_paths
from macft.membership.paxos import Ballot, Heartbeat, MemberRecord, View, Vote

MAX_BYTES = 65_536
_MAX_SEATS = 64
_MAX_TEXT = 255
_MAX_NUMBER = 1 << 62


def encode(beat: Heartbeat, secret: bytes) -> bytes:
    """``beat`` for the members of the run that shares ``secret``."""
    packed: bytes = msgpack.packb(
        [
            mark(secret),
            list(beat.sender),
            plain_view(beat.view),
            list(beat.hears),
            beat.ready,
            list(beat.ballot) if beat.ballot else None,
            _of_vote(beat.proposed),
            list(beat.promised) if beat.promised else None,
            _of_vote(beat.accepted),
        ]
    )
    return packed


def decode(data: bytes, secret: bytes) -> Heartbeat | None:
    """The inverse of :func:`encode`; None for anything else."""
    try:
        values = msgpack.unpackb(data)
        found, sender, view, hears, ready, ballot, proposed, promised, accepted = values
        if found != mark(secret) or type(ready) is not bool or len(hears) > _MAX_SEATS:
            return None
        return Heartbeat(
            sender=to_member_record(sender),
            view=to_view(view),
            hears=tuple(_text(name) for name in hears),
            ready=ready,
            ballot=_to_ballot(ballot),
            proposed=_to_vote(proposed),
            promised=_to_ballot(promised),
            accepted=_to_vote(accepted),
        )
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException):
        return None


def mark(secret: bytes) -> bytes:
    """Shows who belongs to a run, without telling its secret."""
    return hashlib.sha256(b"membership " + secret).digest()[:16]


def to_member_record(value: Any) -> MemberRecord:
    """A seat out of msgpack's types. Raises ValueError or TypeError if it is none."""
    identity, name, address, key, ring, ring_key = value
    for part in (key, ring_key):
        if type(part) is not bytes or len(part) not in (0, KEY_BYTES):
            raise ValueError("not a key")
    split_paths(_text(address))
    if ring:
        split_paths(_text(ring))
    return MemberRecord(_text(identity), _text(name), address, key, _text(ring), ring_key)


def to_view(value: Any) -> View:
    """A view out of msgpack's types. Raises ValueError or TypeError if it is none."""
    generation, seats = value
    if not 0 < len(seats) <= _MAX_SEATS:
        raise ValueError("not a number of members")
    view = View(_number(generation), tuple(to_member_record(seat) for seat in seats))
    if len(set(view.ids)) != len(seats):
        raise ValueError("a member stands twice")
    return view


def plain_view(view: View) -> list[Any]:
    """A view in msgpack's types."""
    return [view.generation, [list(seat) for seat in view.seats]]


def _of_vote(vote: Vote | None) -> list[Any] | None:
    return None if vote is None else [list(vote.ballot), plain_view(vote.view)]


def _to_vote(value: Any) -> Vote | None:
    if value is None:
        return None
    ballot, view = value
    found = _to_ballot(ballot)
    if found is None:
        raise ValueError("a vote without a ballot")
    return Vote(found, to_view(view))


def _to_ballot(value: Any) -> Ballot | None:
    if value is None:
        return None
    number, proposer = value
    return Ballot(_number(number), _text(proposer))


def _number(value: Any) -> int:
    if type(value) is not int or not 0 <= value < _MAX_NUMBER:
        raise ValueError("not a number")
    return value


def _text(value: Any) -> str:
    if type(value) is not str or len(value) > _MAX_TEXT or not value.isprintable():
        raise ValueError("not a text")
    return value
