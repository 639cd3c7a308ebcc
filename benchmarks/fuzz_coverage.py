"""Coverage-guided fuzzing of what a neighbour can send: the header's reader, and what takes in a frame.

    pip install atheris
    python benchmarks/fuzz_coverage.py -max_total_time=120            (any option of libFuzzer)

Whatever comes must be taken in or end with ProtocolError: no other exception, no write beyond the array, no header that
would be packed otherwise than it came. A failure is printed with its input, and kept as ``crash-...``.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["macft.collective"]):
    from macft.collective.ring.buffers import fuse
    from macft.collective.ring.stream import StreamIn, new_buffer
    from macft.collective.ring.transfer import BlobTransfer, GatherReduce, Reduction, Transfer
    from macft.collective.wire import Frame, Header, Kind, pack, unpack

import numpy as np

from macft.errors import ProtocolError

RANKS, RANK, PIECE_BYTES = 3, 1, 4096
LONGEST_BODY = 1 << 16


def transfers() -> list[Transfer]:
    """One call of each sort, as rank 1 of 3 begins it."""
    large, _ = fuse([np.ones(5_000, np.float32)])
    small, _ = fuse([np.ones(100, np.float64)])
    return [
        Reduction(Header(Kind.PIECE, 0, RANK, sequence=1), large, RANKS, PIECE_BYTES),
        GatherReduce(Header(Kind.EXCHANGE, 0, RANK, sequence=1), small, RANKS),
        BlobTransfer(Header(Kind.GATHER, 0, RANK, sequence=1), b"own", RANKS, range(RANKS), PIECE_BYTES),
        BlobTransfer(Header(Kind.BROADCAST, 0, RANK, sequence=1), b"", RANKS, [0], PIECE_BYTES),
    ]


def take(data: bytes) -> None:
    """``data``: which call, and how: headers, each after a byte with its length, or the bytes of a stream."""
    transfer = transfers()[data[0] % 4]
    take_stream(transfer, data[1:]) if data[0] & 128 else take_headers(transfer, data[1:])
    assert isinstance(transfer.incomplete, bool)
    assert 0 <= transfer.next_source < RANKS


def take_headers(transfer: Transfer, rest: bytes) -> None:
    """Frames whose bodies are as long as they say."""
    while rest:
        header, rest = rest[1 : 1 + rest[0]], rest[1 + rest[0] :]
        with complaint():
            read = unpack(header, "a neighbour")
            assert unpack(pack(read), "a neighbour") == read
            if read.kind == transfer.call.kind and read.length <= LONGEST_BODY:
                transfer.receive(Frame(read, bytes(read.length)))


def take_stream(transfer: Transfer, data: bytes) -> None:
    """Frames as a stream has them, received where the call wants them."""

    def buffer_for(header: Header) -> memoryview | None:
        same = header.kind == transfer.call.kind and header.total == transfer.call.total
        return transfer.buffer_for(header, in_place=True) if same else new_buffer(header)

    def next_frame() -> Frame | None:
        try:
            return stream.read(lambda packed: unpack(packed, "a neighbour"), buffer_for)
        except ValueError as error:  # a stream's own; anywhere else it would be a fault
            raise ProtocolError(str(error)) from None

    near, far = socket.socketpair()
    with near, far, complaint():
        near.sendall(data)
        stream = StreamIn(far, PIECE_BYTES, None)
        while (frame := next_frame()) is not None:
            if frame[0].kind == transfer.call.kind:
                transfer.receive(frame)


@contextlib.contextmanager
def complaint() -> Iterator[None]:
    """What is refused is refused in one short line."""
    text = "none"
    try:
        yield
    except ProtocolError as error:
        text = str(error)
    assert len(text.splitlines()) == 1
    assert len(text) < 500


def seeds() -> list[bytes]:
    """Good frames of each call, from which the fuzzer starts."""
    found = []
    for number, transfer in enumerate(transfers()):
        frames = [(header._replace(sender=0), body) for header, body in list(transfer.outgoing)[:2]]
        headers = [pack(header) for header, _ in frames or [(transfer.call, b"")]]
        found.append(bytes([number]) + b"".join(bytes([len(header)]) + header for header in headers))
        found.append(bytes([number | 128]) + b"".join(pack(header) + bytes(body) for header, body in frames))
    return found


def main() -> None:
    corpus = Path(tempfile.mkdtemp(prefix="fuzz-wire-"))
    for number, seed in enumerate(seeds()):
        take(seed)
        (corpus / f"seed-{number}").write_bytes(seed)
    atheris.Setup([*sys.argv, "-max_len=10000", str(corpus)], lambda data: take(data) if data else None)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
