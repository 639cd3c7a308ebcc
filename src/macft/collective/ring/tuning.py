"""Algorithm and piece size of a ring's all-reduces, chosen by measured links. No sockets.

GatherReduce takes n - 1 hops of all bytes, Reduction 2n - 2 hops of an n-th. They are equal at
bytes = latency * speed * n / (n - 2). With two ranks both send the same bytes, so GatherReduce is never slower.
While a piece is added, the wire may be idle, so pieces are smaller on a slow link.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from macft.collective.base import RingSpeed

PROBE_BYTES = 512 * 1024
"""Bytes that each rank gathers to measure the links."""
_MIN_PIECE_BYTES = 128 * 1024
_PIECE_SECONDS = 2e-3
"""Time to send one piece: long enough that the fixed cost of a frame hardly matters."""
_REPORT = "<ddd"


class Tuning(NamedTuple):
    """All-reduces of up to ``gather_reduce_bytes`` use GatherReduce; others are sent in pieces of ``piece_bytes``."""

    gather_reduce_bytes: int
    piece_bytes: int


def report(latency: float, hop: float, from_left: float) -> bytes:
    """What a rank tells the others: seconds of an empty hop, of one with ``PROBE_BYTES``, and of its left link."""
    return struct.pack(_REPORT, latency, *(PROBE_BYTES / max(seconds - latency, 1e-6) for seconds in (hop, from_left)))


class MeasuredRing(NamedTuple):
    """The links as all ranks have measured them: seconds of the fastest hop, bytes a second of the slowest one."""

    speed: RingSpeed
    latency: float
    bandwidth: float
    tuning: Tuning


def measured_ring(reports: Sequence[bytes], limits: Tuning) -> MeasuredRing:
    """What follows from the :func:`report` of each rank, by rank; the same on all of them, and within ``limits``."""
    ranks = len(reports)
    latencies, speeds, links = zip(*(struct.unpack(_REPORT, blob) for blob in reports), strict=True)
    gather_reduce_bytes = limits.gather_reduce_bytes
    if ranks > 2:
        crossover = min(latencies) * min(speeds) * ranks / (ranks - 2)
        gather_reduce_bytes = int(min(crossover, gather_reduce_bytes))
    piece_bytes = max(_MIN_PIECE_BYTES, int(min(speeds) * _PIECE_SECONDS)) & ~7
    return MeasuredRing(
        # What a rank has measured is the link from its left neighbour.
        RingSpeed(sum(latencies) / ranks, (*links[1:], links[0])),
        min(latencies),
        min(speeds),
        Tuning(gather_reduce_bytes, min(piece_bytes, limits.piece_bytes)),
    )
