"""Frame headers: msgpack, validated field by field before anything is believed."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from enum import IntEnum

import msgpack

from macft.errors import ProtocolError

PROTOCOL_VERSION = 1
TOKEN_BYTES = 16
MAX_HEADER_BYTES = 512
MAX_TOTAL_BYTES = 2**36
MAX_TEXT = 300


class Kind(IntEnum):
    """What a frame is part of."""

    ALL_REDUCE = 1
    BROADCAST = 2
    ALL_GATHER = 3
    # The sender waits for a peer, named in `text`; tells the next rank who is to blame.
    WAITING = 4
    # The sender leaves; `text` says why, empty for an orderly end.
    GOODBYE = 5


@dataclass(frozen=True)
class Header:
    """Head of a frame. ``call`` counts the collective calls of a run, ``stage`` and ``piece`` the frames within one.

    ``total`` is the size in bytes of the whole array or blob, ``dtype`` a NumPy type character, empty for blobs.
    ``generation`` is that of the membership; a frame of another one is not of this ring.
    """

    kind: Kind
    sender: int
    call: int
    stage: int = 0
    piece: int = 0
    total: int = 0
    dtype: str = ""
    generation: int = 0
    text: str = ""

    def describe(self) -> str:
        """What the sender is doing, for messages to people."""
        name = self.kind.name.lower().replace("_", "-")
        return f"{name} {self.call} of {self.total} bytes"


_LIMITS = {
    "sender": 2**16,
    "call": 2**53,
    "stage": 2**17,
    "piece": 2**32,
    "total": MAX_TOTAL_BYTES,
    "generation": 2**53,
}


def pack(token: bytes, header: Header) -> bytes:
    """The header as bytes; ``token`` is the secret of the run, which keeps frames of other runs out."""
    packed: bytes = msgpack.packb((PROTOCOL_VERSION, token, *astuple(header)))
    return packed


def unpack(data: bytes | memoryview, token: bytes) -> Header:
    """Reads a header.

    Raises:
        ProtocolError: ``data`` is no header of this protocol version and run; the message says what is wrong.
    """
    if len(data) > MAX_HEADER_BYTES + MAX_TEXT * 4:
        raise ProtocolError(f"a header of {len(data)} bytes is too long")
    try:
        fields = msgpack.unpackb(bytes(data), use_list=True, strict_map_key=True)
    except Exception as error:  # msgpack raises several unrelated types for malformed input
        raise ProtocolError(f"a header is not msgpack ({type(error).__name__})") from error
    if not isinstance(fields, list) or len(fields) != 11:
        raise ProtocolError("a header does not have the 11 fields of this protocol")
    version, found_token, kind, sender, call, stage, piece, total, dtype, generation, text = fields
    if version != PROTOCOL_VERSION:
        raise ProtocolError(f"a header has protocol version {version!r}, this is {PROTOCOL_VERSION}")
    if found_token != token:
        raise ProtocolError("a header is of another run")
    if type(kind) is not int or kind not in {item.value for item in Kind}:
        raise ProtocolError(f"a header has unknown kind {kind!r}")
    numbers = {"sender": sender, "call": call, "stage": stage, "piece": piece, "total": total, "generation": generation}
    for name, value in numbers.items():
        if type(value) is not int or not 0 <= value < _LIMITS[name]:
            raise ProtocolError(f"a header has {name} {value!r}, which is not from 0 to {_LIMITS[name]}")
    if dtype not in ("", "f", "d") or not isinstance(text, str) or len(text) > MAX_TEXT:
        raise ProtocolError("a header has an unknown dtype or too long a text")
    return Header(Kind(kind), sender, call, stage, piece, total, dtype, generation, text)
