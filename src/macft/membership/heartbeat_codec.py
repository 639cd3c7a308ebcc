"""Heartbeats as bytes: msgpack with every length limited. Anything but a valid heartbeat of this run is ignored.

Values from the wire have the type ``object`` until they have been checked.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from typing import TypeAlias

import msgpack

from macft.collective.ring.security import KEY_BYTES
from macft.collective.wire import split_paths
from macft.membership.paxos import Ballot, Heartbeat, MemberRecord, View, Vote

MAX_BYTES = 65_536
_MAX_MEMBERS = 64
_MAX_TEXT = 255
_MAX_NUMBER = 1 << 62
_AUTHENTICATION_BYTES = 16

EncodedView: TypeAlias = list[object]
"""A view as msgpack sends it: ``[generation, [member, ...]]``."""


def encode_heartbeat(heartbeat: Heartbeat, secret: bytes) -> bytes:
    """``heartbeat`` as bytes, authenticated with the ``secret`` that the members of a run share."""
    packed: bytes = msgpack.packb(
        [
            heartbeat.number,
            list(heartbeat.sender),
            encode_view(heartbeat.view),
            list(heartbeat.hears),
            heartbeat.ready,
            list(heartbeat.ballot) if heartbeat.ballot else None,
            _encode_vote(heartbeat.proposed),
            list(heartbeat.promised) if heartbeat.promised else None,
            _encode_vote(heartbeat.accepted),
            heartbeat.stops,
        ]
    )
    return _authentication(packed, secret) + packed


def decode_heartbeat(data: bytes, secret: bytes) -> Heartbeat | None:
    """The inverse of :func:`encode_heartbeat`; None for anything else, which includes any change of a heartbeat."""
    packed = data[_AUTHENTICATION_BYTES:]
    if not hmac.compare_digest(data[:_AUTHENTICATION_BYTES], _authentication(packed, secret)):
        return None
    try:
        number, sender, view, hears, ready, ballot, proposed, promised, accepted, stops = _array(
            msgpack.unpackb(packed)
        )
        heard = _array(hears)
        if type(ready) is not bool or type(stops) is not bool or len(heard) > _MAX_MEMBERS:
            return None
        return Heartbeat(
            sender=decode_member(sender),
            view=decode_view(view),
            hears=tuple(decode_text(node) for node in heard),
            ready=ready,
            ballot=_decode_ballot(ballot),
            proposed=_decode_vote(proposed),
            promised=_decode_ballot(promised),
            accepted=_decode_vote(accepted),
            number=_number(number),
            stops=stops,
        )
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException):
        return None


def _authentication(packed: bytes, secret: bytes) -> bytes:
    """BLAKE2b keyed with the run's secret (RFC 7693): only a member can make it."""
    key = hashlib.sha256(b"membership " + secret).digest()
    return hashlib.blake2b(packed, key=key, digest_size=_AUTHENTICATION_BYTES).digest()


def decode_member(value: object) -> MemberRecord:
    """A member from msgpack's types. Raises ValueError or TypeError if it is not valid."""
    identity, name, address, key, ring, ring_key = _array(value)
    address, ring = decode_text(address), decode_text(ring)
    split_paths(address)
    if ring:
        split_paths(ring)
    return MemberRecord(decode_text(identity), decode_text(name), address, _key(key), ring, _key(ring_key))


def decode_view(value: object) -> View:
    """A view from msgpack's types. Raises ValueError or TypeError if it is not valid."""
    generation, members = _array(value)
    members = _array(members)
    if not 0 < len(members) <= _MAX_MEMBERS:
        raise ValueError(f"{len(members)} members; a view has 1 to {_MAX_MEMBERS}")
    view = View(_number(generation), tuple(decode_member(member) for member in members))
    if len(set(view.ids)) != len(members):
        raise ValueError("a member is listed twice")
    return view


def encode_view(view: View) -> EncodedView:
    """A view in msgpack's types."""
    return [view.generation, [list(member) for member in view.members]]


def _encode_vote(vote: Vote | None) -> list[object] | None:
    return None if vote is None else [list(vote.ballot), encode_view(vote.view)]


def _decode_vote(value: object) -> Vote | None:
    if value is None:
        return None
    encoded_ballot, view = _array(value)
    ballot = _decode_ballot(encoded_ballot)
    if ballot is None:
        raise ValueError("a vote has no ballot")
    return Vote(ballot, decode_view(view))


def _decode_ballot(value: object) -> Ballot | None:
    if value is None:
        return None
    number, proposer = _array(value)
    return Ballot(_number(number), decode_text(proposer))


def _array(value: object) -> Sequence[object]:
    if not isinstance(value, list):
        raise TypeError("not an array")
    return value


def _number(value: object) -> int:
    if type(value) is not int or not 0 <= value < _MAX_NUMBER:
        raise ValueError(f"not an integer from 0 to {_MAX_NUMBER - 1}")
    return value


def decode_text(value: object) -> str:
    """A short printable text from msgpack's types. Raises ValueError for anything else."""
    if type(value) is not str or len(value) > _MAX_TEXT or not value.isprintable():
        raise ValueError(f"not a printable string of at most {_MAX_TEXT} characters")
    return value


def _key(value: object) -> bytes:
    if type(value) is not bytes or len(value) not in (0, KEY_BYTES):
        raise ValueError(f"not a key of {KEY_BYTES} bytes")
    return value
