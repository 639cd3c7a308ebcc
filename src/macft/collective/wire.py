"""The wire format between two neighbours: the header of every frame, and addresses.

A frame is a header and, for data, a body of ``length`` bytes. It is sent as one ZeroMQ message, or as consecutive bytes
of a stream. Data headers have a fixed layout of ``DATA_HEADER_BYTES`` bytes; all others are msgpack arrays. Liveness
needs no frames: ZMTP's own heartbeats (RFC 37) come from ZeroMQ's I/O thread, even while Python computes.
"""

from __future__ import annotations

import enum
import operator
import socket
import struct
from typing import NamedTuple, TypeAlias

import msgpack
import zmq

from macft.collective.dtypes import WIRE_TYPES
from macft.errors import CollectiveError, ProtocolError

PROTOCOL_VERSION = 4
MAX_HEADER_BYTES = 1024
MAX_CALL_BYTES = 1 << 40
"""Most bytes one all-reduce may sum."""
MAX_BLOB_BYTES = 1 << 36
"""Most bytes one rank may broadcast or gather: 64 GiB, enough for the state of full fine-tuning."""
MAX_MESSAGE_BYTES = 1 << 32
"""Most bytes of a message from one rank to another."""
MAX_PATHS = 8
"""Most cables between two neighbours."""
MAX_TEXT = 400
LINGER_SECONDS = 1.0
"""How long closing may wait for the last frames to be sent."""

Body: TypeAlias = bytes | memoryview


class Kind(enum.IntEnum):
    """The kind of a frame. The numbers are part of the wire protocol and never change."""

    HELLO = 1  # the first frame to the right neighbour
    CREDIT = 2  # to the left neighbour: this many more frames may be sent
    GOODBYE = 3  # the sender leaves, with the reason
    PIECE = 4  # part of an array in an all-reduce
    BROADCAST = 5
    GATHER = 6
    BARRIER = 7
    EXCHANGE = 8  # all arrays of a small all-reduce
    STREAM = 9  # to the left neighbour: data may be sent over a plain TCP connection
    MESSAGE = 10  # part of a message on a channel between two ranks


class Cause(enum.IntEnum):
    """Why a rank leaves."""

    DONE = 0  # closed normally
    LOST = 1
    TIMEOUT = 2
    PROTOCOL = 3
    STOPPED = 4  # by its user


CALL_NAMES = {
    Kind.PIECE: "all-reduce",
    Kind.BROADCAST: "broadcast",
    Kind.GATHER: "all-gather",
    Kind.BARRIER: "barrier",
    Kind.EXCHANGE: "all-reduce",
    Kind.MESSAGE: "message",
}


class Header(NamedTuple):
    """The header of a frame; which fields a frame carries depends on its kind."""

    kind: Kind
    # Counts the rings of a run, so that frames of an earlier ring are recognised.
    generation: int
    sender: int
    # The following are those of data. The number of the collective call:
    sequence: int = 0
    # bytes of the whole call, or of the whole blob:
    total: int = 0
    # CRC-32 of the sizes and dtypes of its arrays:
    layout: int = 0
    # links that this part has travelled when it arrives:
    hop: int = 0
    # its number among the parts of its chunk:
    piece: int = 0
    dtype: str = ""
    # bytes of the body:
    length: int = 0
    # CREDIT: number of frames.
    frames: int = 0
    # GOODBYE: a Cause, and the rank that caused it.
    cause: int = 0
    culprit: int = 0
    # HELLO: the ring's id. GOODBYE: the reason in words. STREAM: the secret in hexadecimal.
    text: str = ""
    # STREAM: the TCP port.
    port: int = 0

    def __str__(self) -> str:
        """For data: the collective call this frame belongs to, in words: ``all-reduce 5 of 1024 bytes``."""
        size = f" of {self.total} bytes" if self.kind in (Kind.PIECE, Kind.EXCHANGE) else ""
        return f"{CALL_NAMES[self.kind]} {self.sequence}{size}"


class Frame(NamedTuple):
    """A data frame: ``body`` has ``header.length`` bytes."""

    header: Header
    body: Body


# Version, kind, sender, generation, sequence, total, layout, hop, piece, dtype, length: as in Header.
_DATA = struct.Struct("!BBHIQQIIIBI")
DATA_HEADER_BYTES = _DATA.size
_TYPES = ("", *WIRE_TYPES)
_TYPE_NUMBERS = {name: number for number, name in enumerate(_TYPES)}
_DATA_KINDS = {int(kind): kind for kind in CALL_NAMES}
_MAX_TOTAL = {
    Kind.BROADCAST: MAX_BLOB_BYTES,
    Kind.GATHER: MAX_BLOB_BYTES,
    Kind.BARRIER: MAX_BLOB_BYTES,
    Kind.MESSAGE: MAX_MESSAGE_BYTES,
}
_MAX_SEQUENCE, _MAX_HOP, _MAX_LENGTH = (1 << 63) - 1, 131_072, 1 << 30

_FIELDS = {
    Kind.HELLO: ("text",),
    Kind.CREDIT: ("frames",),
    Kind.GOODBYE: ("cause", "culprit", "text"),
    Kind.STREAM: ("port", "text"),
}
# The largest valid value of each number.
_HIGHEST = {
    "generation": (1 << 32) - 1,
    "sender": 65_535,
    "frames": 65_535,
    "cause": int(max(Cause)),
    "culprit": 65_535,
    "port": 65_535,
}
_FRAMES = {int(kind): (kind, ("generation", "sender", *fields)) for kind, fields in _FIELDS.items()}
_GETTERS = {kind: operator.attrgetter("kind", "generation", "sender", *fields) for kind, fields in _FIELDS.items()}


def pack(header: Header) -> bytes:
    """The bytes of a header."""
    if header.kind in _DATA_KINDS:
        return _DATA.pack(
            PROTOCOL_VERSION,
            header.kind,
            header.sender,
            header.generation,
            header.sequence,
            header.total,
            header.layout,
            header.hop,
            header.piece,
            _TYPE_NUMBERS[header.dtype],
            header.length,
        )
    packed: bytes = msgpack.packb((PROTOCOL_VERSION, *_GETTERS[header.kind](header)))
    return packed


def unpack(data: bytes | memoryview, peer: str) -> Header:
    """Reads a header that ``peer`` (its name, for messages) has sent.

    Raises:
        ProtocolError: not a valid header of this protocol version; names the peer and what is wrong.
    """
    if len(data) == DATA_HEADER_BYTES and data[0] == PROTOCOL_VERSION:
        return _unpack_data(data, peer)
    if len(data) > MAX_HEADER_BYTES:
        raise ProtocolError(f"{peer} sent a header of {len(data)} bytes; {MAX_HEADER_BYTES} are the most")
    try:
        values = msgpack.unpackb(data)
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException) as error:
        raise ProtocolError(f"{peer} sent a header that is not msgpack ({type(error).__name__})") from None
    if not isinstance(values, list) or len(values) < 4:
        raise ProtocolError(f"{peer} sent a header that is not an array of four or more fields")
    if values[0] != PROTOCOL_VERSION or type(values[0]) is not int:
        raise ProtocolError(
            f"{peer} speaks protocol version {repr(values[0])[:20]}, this rank {PROTOCOL_VERSION}; "
            "install the same macft on all nodes"
        )
    if type(values[1]) is not int or values[1] not in _FRAMES:
        raise ProtocolError(f"{peer} sent a frame of unknown kind {repr(values[1])[:20]}")
    kind, names = _FRAMES[values[1]]
    if len(values) != 2 + len(names):
        raise ProtocolError(f"{peer} sent a {kind.name} header of {len(values)} fields, not {2 + len(names)}")
    for name, value in zip(names, values[2:], strict=True):
        if name == "text":
            valid = type(value) is str and len(value) <= MAX_TEXT
        else:
            valid = type(value) is int and 0 <= value <= _HIGHEST[name]  # type(): a bool is not accepted
        if not valid:
            raise ProtocolError(f"{peer} sent a {kind.name} header whose {name} is {str(value)[:40]!r}")
    return Header(kind, values[2], values[3], **dict(zip(_FIELDS[kind], values[4:], strict=True)))


def _unpack_data(data: bytes | memoryview, peer: str) -> Header:
    _, number, sender, generation, sequence, total, layout, hop, piece, dtype, length = _DATA.unpack(data)
    kind = _DATA_KINDS.get(number)
    if kind is None:
        raise ProtocolError(f"{peer} sent a frame of unknown kind {number}")
    max_dtype = len(_TYPES) - 1 if kind is Kind.PIECE else 0
    if dtype > max_dtype or (kind is Kind.PIECE and not dtype):
        raise ProtocolError(f"{peer} sent a {kind.name} header whose dtype is {dtype}")
    max_total = _MAX_TOTAL.get(kind, MAX_CALL_BYTES)
    if sequence > _MAX_SEQUENCE or total > max_total or hop > _MAX_HOP or length > _MAX_LENGTH:
        for name, value, limit in (
            ("sequence", sequence, _MAX_SEQUENCE),
            ("total", total, max_total),
            ("hop", hop, _MAX_HOP),
            ("length", length, _MAX_LENGTH),
        ):
            if value > limit:
                raise ProtocolError(f"{peer} sent a {kind.name} header whose {name} is '{value}'")
    return Header(
        kind,
        generation,
        sender,
        sequence=sequence,
        total=total,
        layout=layout,
        hop=hop,
        piece=piece,
        dtype=_TYPES[dtype],
        length=length,
    )


def split_address(address: str) -> tuple[str, int]:
    """``"host:port"`` or ``"[v6]:port"`` to (host, port) without brackets; ValueError if it is neither."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65_535:
        raise ValueError(f"'{address}' is not host:port")
    return host.removeprefix("[").removesuffix("]"), int(port)


def split_paths(address: str) -> list[str]:
    """Splits ``"host:port+host:port"``, one for each cable; ValueError if one is malformed."""
    paths = address.split("+")
    if len(paths) > MAX_PATHS:
        raise ValueError(f"'{address[:80]}' has {len(paths)} paths; {MAX_PATHS} are the most")
    for path in paths:
        split_address(path)
    return paths


def set_endpoint(sock: zmq.Socket[bytes], address: str) -> str:
    """The ZeroMQ endpoint of ``"host:port"``, with the name resolved; enables IPv6 on ``sock`` where needed.

    Raises:
        CollectiveError: the address is malformed, or the name is unknown.
    """
    try:
        host, port = split_address(address)
        # ZeroMQ binds to numbers only and prefers IPv6 for names; this uses the system's order instead.
        family, _, _, _, resolved = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (ValueError, OSError) as error:
        raise CollectiveError(f"address {address}: {error}") from None
    sock.ipv6 = family == socket.AF_INET6
    return f"tcp://[{resolved[0]}]:{port}" if sock.ipv6 else f"tcp://{resolved[0]}:{port}"


def bind(sock: zmq.Socket[bytes], address: str) -> str:
    """Binds ``sock`` to ``"host:port"`` (port 0: a free one); returns ``host:port`` with the actual port.

    Raises:
        CollectiveError: the address is not this machine's, or is in use.
    """
    endpoint = set_endpoint(sock, address)
    try:
        sock.bind(endpoint)
    except zmq.ZMQError as error:
        raise CollectiveError(
            f"can't listen on {address}: {error}; does another run use the port, and is the address this machine's own?"
        ) from None
    endpoint_bytes = sock.getsockopt(zmq.LAST_ENDPOINT)
    assert isinstance(endpoint_bytes, bytes)
    port = endpoint_bytes.decode().rpartition(":")[2]
    return f"{address.rpartition(':')[0]}:{port}"


def probe(address: str, seconds: float) -> str:
    """Whether a live ZeroMQ socket listens at ``"host:port"``.

    ZeroMQ's I/O thread greets every connection at once, even while Python computes. Returns ``alive`` (greeted),
    ``ended`` (connection refused: the process is gone), ``silent`` (no greeting: the process is stopped) or
    ``unreachable`` (no answer within ``seconds``).
    """
    try:
        connection = socket.create_connection(split_address(address), timeout=seconds)
    except (ConnectionRefusedError, ConnectionResetError):
        return "ended"
    except OSError:
        return "unreachable"
    with connection:
        try:
            return "alive" if connection.recv(1) else "ended"
        except TimeoutError:
            return "silent"
        except OSError:
            return "ended"
