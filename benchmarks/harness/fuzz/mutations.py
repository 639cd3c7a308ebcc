"""Makes malformed frames from valid ones. The same seed makes the same frames."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import msgpack

NULL_GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"NULL".ljust(20, b"\0") + bytes(32)
CURVE_GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"CURVE".ljust(20, b"\0") + bytes(32)
_METADATA = b"\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER"
READY = bytes([4, len(_METADATA)]) + _METADATA
CURVE_HELLO = bytes([4, 200]) + b"\x05HELLO\x01\x00" + bytes(193)
_LENGTHS = (0, 1, 255, 256, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1)
_BOMBS = (
    b"\x91" * 900,  # arrays in arrays
    b"\x81\xa1a" * 300,  # maps in maps
    b"\xdd\xff\xff\xff\xff",  # an array of 2^32 - 1 items that are not there
    b"\xdf\xff\xff\xff\xff",
    b"\xdb\xff\xff\xff\xff",  # a text of 4 GiB
    b"\xc6\xff\xff\xff\xff",
    b"\xc9\xff\xff\xff\xff\xff",  # an extension type
    b"\xd7\xff" + b"\xff" * 8,  # a time that no clock shows
    b"\xc1",
    b"\x81\x90\x01",  # a map whose key is an array
    b"\xa2\xff\xfe",  # a text that is not UTF-8
)
_VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1,
    2**16,
    2**32,
    2**63,
    2**64 - 1,
    0.5,
    float("nan"),
    "",
    "\x1b[2J\n",
    "x" * 500,
    b"",
    b"k" * 32,
    [],
    {},
    [[]],
)


class Mutator:
    """Draws malformed frames from ``seed``, any text."""

    def __init__(self, seed: str):
        self.random = random.Random(seed)
        self._kinds: tuple[Callable[[bytes], bytes], ...] = (
            self._flip,
            self._flip,
            self._flip,
            self._truncate,
            self._extend,
            self._repeat_part,
            self._set_length,
            self._field,
            self._field,
            self._field,
            self._bomb,
            self._noise,
        )

    def frame(self, valid: Sequence[bytes], *, replay: bool = True) -> bytes:
        """One frame made of one of ``valid``: changed, or with ``replay`` also as it was once sent."""
        frame = self.random.choice(valid)
        if replay and self.random.random() < 0.1:
            return frame
        changed = self.random.choice(self._kinds)(frame)
        return changed if changed != frame else self._noise(frame)

    def chunks(self, session: Sequence[bytes]) -> list[bytes]:
        """The bytes of a whole connection: some parts changed, left out, doubled or in another order."""
        parts = [self.frame([part]) if self.random.random() < 0.3 else part for part in session]
        match self.random.randrange(5):
            case 0:
                self.random.shuffle(parts)
            case 1:
                parts.insert(self.random.randrange(len(parts) + 1), self.random.choice(parts))
            case 2:
                del parts[self.random.randrange(len(parts)) :]
            case 3:
                parts.append(bytes([self.random.choice((0, 1, 2, 3, 4, 6))]) + self._number().to_bytes(8, "big"))
        return [part for part in parts if part]

    def _number(self) -> int:
        return self.random.choice(_LENGTHS)

    def _flip(self, frame: bytes) -> bytes:
        data = bytearray(frame or b"\0")
        for _ in range(self.random.choice((1, 1, 1, 2, 8))):
            data[self.random.randrange(len(data))] ^= 1 << self.random.randrange(8)
        return bytes(data)

    def _truncate(self, frame: bytes) -> bytes:
        return frame[: self.random.randrange(len(frame) + 1)]

    def _extend(self, frame: bytes) -> bytes:
        return frame + self.random.randbytes(self.random.choice((1, 8, 300)))

    def _repeat_part(self, frame: bytes) -> bytes:
        first, last = sorted(self.random.randrange(len(frame) + 1) for _ in range(2))
        return frame[:last] + frame[first:]

    def _set_length(self, frame: bytes) -> bytes:
        """Another number where there may be a length, a rank, a generation or a sequence."""
        size = self.random.choice((1, 2, 4, 8))
        place = self.random.randrange(max(1, len(frame) - size + 1))
        number = (self._number() % (1 << (8 * size))).to_bytes(size, self.random.choice(("big", "little")))
        return frame[:place] + number + frame[place + size :]

    def _field(self, frame: bytes) -> bytes:
        """Another value for one field of a msgpack message."""
        try:
            message = msgpack.unpackb(frame, strict_map_key=False)
        except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException):
            return self._set_length(frame)
        holder, place = None, None
        inner = message
        while isinstance(inner, list | dict) and inner and (holder is None or self.random.random() < 0.7):
            holder = inner
            place = self.random.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
            inner = holder[place]
        if holder is None:
            return self._bomb(frame)
        if self.random.random() < 0.2:
            del holder[place]
        else:
            holder[place] = self.random.choice(_VALUES)
        packed: bytes = msgpack.packb(message)
        return packed

    def _bomb(self, frame: bytes) -> bytes:
        return self.random.choice((b"", frame[:1], b"\x99", b"\x92")) + self.random.choice(_BOMBS)

    def _noise(self, frame: bytes) -> bytes:  # noqa: ARG002
        return self.random.randbytes(self.random.choice((1, 16, 38, 300, 5_000)))


def zmtp(*parts: bytes) -> list[bytes]:
    """A ZeroMQ message as bytes of a connection (RFC 23): a frame for each of ``parts``."""
    frames = []
    for number, part in enumerate(parts):
        more = int(number < len(parts) - 1)
        head = bytes([more, len(part)]) if len(part) < 256 else bytes([more | 2]) + len(part).to_bytes(8, "big")
        frames.append(head + part)
    return frames
