"""Coverage-guided fuzzing of what a neighbour can send: the header's reader, and what takes in a frame.

    pip install atheris
    python benchmarks/fuzz_wire.py -max_total_time=120            (any option of libFuzzer)

Whatever comes must be taken in or end with ProtocolError: no other exception, no write beyond the array, no header that
would be packed otherwise than it came. A failure is printed with its input, and kept as ``crash-...``.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["macft.collective"]):
    from macft.collective.transfer import Exchange, Reduction, Spread, Transfer, fuse
    from macft.collective.wire import Header, Kind, pack, unpack

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
        Exchange(Header(Kind.EXCHANGE, 0, RANK, sequence=1), small, RANKS),
        Spread(Header(Kind.GATHER, 0, RANK, sequence=1), b"own", RANKS, range(RANKS), PIECE_BYTES),
        Spread(Header(Kind.BROADCAST, 0, RANK, sequence=1), b"", RANKS, [0], PIECE_BYTES),
    ]


def take(data: bytes) -> None:
    """``data``: which call, then headers, each after a byte with its length; bodies are as long as they say."""
    transfer = transfers()[data[0] % 4]
    rest = data[1:]
    while rest:
        complaint = "none"
        header, rest = rest[1 : 1 + rest[0]], rest[1 + rest[0] :]
        try:
            read = unpack(header, "a neighbour")
            assert unpack(pack(read), "a neighbour") == read
            if read.kind == transfer.call.kind and read.length <= LONGEST_BODY:
                transfer.take(read, bytes(read.length))
        except ProtocolError as error:
            complaint = str(error)
        assert len(complaint.splitlines()) == 1
        assert len(complaint) < 500
    assert isinstance(transfer.missing, bool)
    assert 0 <= transfer.awaited < RANKS


def seeds() -> list[bytes]:
    """Good frames of each call, from which the fuzzer starts."""
    found = []
    for number, transfer in enumerate(transfers()):
        headers = [header._replace(sender=0) for header, _ in list(transfer.outgoing)[:2]] or [transfer.call]
        found.append(bytes([number]) + b"".join(bytes([len(pack(header))]) + pack(header) for header in headers))
    return found


def main() -> None:
    corpus = Path(tempfile.mkdtemp(prefix="fuzz-wire-"))
    for number, seed in enumerate(seeds()):
        take(seed)
        (corpus / f"seed-{number}").write_bytes(seed)
    atheris.Setup([*sys.argv, "-max_len=1000", str(corpus)], lambda data: take(data) if data else None)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
