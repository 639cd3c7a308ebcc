"""The messages of the rendezvous: what a rank sends, and the roster of all ranks that it gets.

A rank sends a map with ``protocol``, ``version``, ``run_id``, ``world_size``, ``must_match``, ``rank``, ``name``,
``address`` and, in an encrypted run, ``key``. It gets ``{"waiting": text, "missing": ranks}`` any number of times,
then either ``{"refused": text}`` or the roster: ``addresses``, ``names``, ``ring_id`` and ``keys``. Messages are
msgpack; a value from the wire has the type ``object`` until it has been checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias, TypeGuard

import msgpack

import macft
from macft.collective.ring.security import KEY_BYTES
from macft.collective.wire import PROTOCOL_VERSION, split_paths

MAX_NAME = 255

Message: TypeAlias = Mapping[str, object]


@dataclass(frozen=True)
class Roster:
    """All ranks of a run.

    Attributes:
        addresses: Ring addresses (``host:port``), by rank.
        names: Host names, by rank.
        ring_id: Known to these ranks only.
        keys: Public keys of the ranks' rings, by rank; empty if the run is not encrypted.
    """

    addresses: tuple[str, ...]
    names: tuple[str, ...]
    ring_id: str
    keys: tuple[bytes, ...] = ()

    def to_message(self) -> Message:
        """The message with which the server sends it."""
        return {"addresses": self.addresses, "names": self.names, "ring_id": self.ring_id, "keys": self.keys}

    @classmethod
    def from_message(cls, message: Message, world_size: int, *, is_encrypted: bool) -> Roster | None:
        """The inverse of :meth:`to_message`; None if the message is not valid."""
        addresses, names, ring_id = message.get("addresses"), message.get("names"), message.get("ring_id")
        keys = message.get("keys")
        if not (isinstance(addresses, list) and isinstance(names, list) and isinstance(keys, list)):
            return None
        if not len(addresses) == len(names) == world_size or len(keys) != (world_size if is_encrypted else 0):
            return None
        texts = [*addresses, *names, ring_id]
        if not (all(map(is_text, texts)) and all(map(is_address, addresses)) and all(map(is_key, keys))):
            return None
        return cls(tuple(addresses), tuple(names), str(ring_id), tuple(keys))


def agreed_values(run_id: str, world_size: int) -> dict[str, object]:
    """What all ranks must send alike, apart from settings and versions."""
    return {
        "protocol": PROTOCOL_VERSION,
        "version": macft.__version__,
        "run_id": run_id,
        "world_size": world_size,
    }


def unpack_message(data: bytes) -> Message | None:
    """A message; None for anything that is not one."""
    try:
        message = msgpack.unpackb(data)
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException):
        return None
    return message if isinstance(message, dict) and all(isinstance(key, str) for key in message) else None


def is_text(value: object) -> TypeGuard[str]:
    """Whether it is a string of at most ``MAX_NAME`` characters."""
    return isinstance(value, str) and len(value) <= MAX_NAME


def is_key(value: object) -> TypeGuard[bytes]:
    """Whether it has the size of a public key."""
    return isinstance(value, bytes) and len(value) == KEY_BYTES


def is_address(value: object) -> TypeGuard[str]:
    """Whether it is ``host:port``, or several of these joined by ``+``."""
    if not is_text(value):
        return False
    try:
        split_paths(value)
    except ValueError:
        return False
    return True
