"""Whatever is thrown at a live ring: it goes on, or ends with an error on all ranks; no hang, crash or wrong sum."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgpack
import numpy as np
import psutil
import pytest
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.rings import LiveRing, live_ring
from macft.collective.ring.listener import Listener
from macft.collective.ring.ring import Ring
from macft.collective.ring.security import KeyPair, encrypt_to
from macft.collective.settings import CollectiveConfig
from macft.collective.wire import PROTOCOL_VERSION, Cause, Header, Kind, pack
from macft.errors import CollectiveError

FUZZ = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01"
NULL, CURVE = (GREETING + name.ljust(20, b"\0") + bytes(32) for name in (b"NULL", b"CURVE"))
_METADATA = b"\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER"
READY = bytes([4, len(_METADATA)]) + _METADATA
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(), st.text(), st.binary())
FIELDS = {
    "generation": st.integers(1, 2**32 - 1),
    "sender": st.integers(2, 65_535),
    "sequence": st.integers(2**40, 2**63 - 1),
    "total": st.integers(0, 2**36).filter(lambda total: total not in (12, 400_000)),
    "layout": st.integers(0, 2**32 - 1),
    "hop": st.integers(3, 131_072),
    "piece": st.integers(2**16, 2**32 - 1),
    "length": st.integers(0, 2**30).filter(lambda length: length not in (12, 200_000)),
    "cause": st.sampled_from(Cause).map(int),
    "frames": st.integers(33, 65_535),
    "text": st.text(max_size=100),
}


def data_headers(sender: int) -> st.SearchStrategy[bytes]:
    """Headers in good form with one field that does not fit what rank ``sender`` may say."""
    good = Header(Kind.PIECE, 0, sender, 1, 400_000, 0, 1, 0, "<f4", 200_000)
    changes = st.sampled_from(sorted(FIELDS)).flatmap(lambda name: FIELDS[name].map(lambda value: {name: value}))
    kinds = st.sampled_from([kind for kind in Kind if kind != Kind.GOODBYE])
    return st.tuples(kinds, changes).map(
        lambda drawn: pack(good._replace(kind=drawn[0], dtype="<f4" if drawn[0] == Kind.PIECE else "", **drawn[1]))
    )


def frames(sender: int) -> st.SearchStrategy[list[bytes]]:
    """Messages of one to four parts, the first of them a header, or something like one."""
    packed = st.lists(SCALARS, max_size=12).map(lambda fields: msgpack.packb([PROTOCOL_VERSION, *fields]))
    mutated = st.tuples(data_headers(sender), st.integers(0, 40), st.integers(1, 255)).map(flip)
    header = st.one_of(st.binary(max_size=2000), packed, mutated, data_headers(sender))
    return st.tuples(header, st.lists(st.binary(max_size=300), max_size=3)).map(lambda parts: [parts[0], *parts[1]])


def flip(drawn: tuple[bytes, int, int]) -> bytes:
    """A header with some bits of one byte the other way."""
    data, place, bits = bytearray(drawn[0]), *drawn[1:]
    data[place % len(data)] ^= bits
    return bytes(data)


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "encrypted"])
def live(request: pytest.FixtureRequest) -> Iterator[LiveRing]:
    with live_ring(2, encrypted=request.param) as ring:
        before = psutil.Process().memory_info().rss
        yield ring
        assert psutil.Process().memory_info().rss - before < 250_000_000


@pytest.mark.slow
@FUZZ
@given(
    st.sampled_from([b"", GREETING, NULL, CURVE, NULL + READY]),
    st.lists(
        st.one_of(
            st.binary(max_size=500),
            st.tuples(st.sampled_from([0, 1, 2, 3, 4, 6]), st.integers(0, 2**64 - 1)).map(
                lambda drawn: bytes([drawn[0]]) + drawn[1].to_bytes(8, "big")  # a ZMTP frame of any length
            ),
            st.just(bytes(65_536)),
        ),
        max_size=4,
    ),
)
def test_bytes_of_a_stranger(live: LiveRing, greeting: bytes, chunks: list[bytes]) -> None:
    host, port = live.addresses[1].split(":")
    with socket.create_connection((host, int(port)), timeout=10) as stranger:
        with contextlib.suppress(OSError):  # thrown out already
            for chunk in (greeting, *chunks):
                stranger.sendall(chunk)
        live.goes_on()


@FUZZ
@given(frames(0))
def test_frames_of_a_stranger(live: LiveRing, parts: list[bytes]) -> None:
    hello = pack(Header(Kind.HELLO, 0, 0, text="not the ring's id"))
    with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
        stranger.linger = 0
        if live.keys[1]:
            encrypt_to(stranger, KeyPair.new(), live.keys[1])
        stranger.connect(f"tcp://{live.addresses[1]}")
        for message in ([hello], parts, parts):
            with contextlib.suppress(zmq.Again):  # thrown out already
                stranger.send_multipart(message, zmq.NOBLOCK)
        live.goes_on()


def test_a_flood_of_a_stranger_takes_no_memory_of_an_encrypted_ring() -> None:
    """Without encryption it does: docs/security.md."""
    with live_ring(encrypted=True) as live, zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
        before = psutil.Process().memory_info().rss
        stranger.linger, stranger.sndhwm = 0, 8
        stranger.connect(f"tcp://{live.addresses[1]}")
        for _ in range(1_000):  # 500 MB, if anybody keeps them
            if not stranger.poll(50, zmq.POLLOUT):
                break
            try:
                stranger.send(bytes(500_000), zmq.NOBLOCK)
            except zmq.Again:  # the ring has just closed the connection
                break
        live.goes_on()
        assert psutil.Process().memory_info().rss - before < 100_000_000


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(frames(0), st.booleans(), st.sampled_from([3, 100_000]))
def test_frames_of_a_neighbour_that_is_let_in(parts: list[bytes], backwards: bool, size: int) -> None:
    """Rank 0 says something odd to rank 1 (or backwards, to the one before it), and both go on as if it had not."""
    config = CollectiveConfig(timeout=20.0, heartbeat=0.5)
    listeners = [Listener("127.0.0.1:0", config, encrypted=True) for _ in range(2)]
    addresses = [listener.address for listener in listeners]
    keys = [listener.security.public_key for listener in listeners if listener.security]

    completed = [0, 0]  # calls, by rank

    def work(rank: int) -> Any:
        assert listeners[rank].security is not None
        listeners[rank].security.meet(keys, rank)
        array = np.full(size, rank + 1.0, np.float32)
        try:
            with Ring(rank, 2, addresses, listeners[rank], ring_id="fuzz") as ring:
                if rank == 0 and backwards:
                    path = ring._links.recv_paths[0]
                    path.sock.send_multipart([path.peer, *parts])
                elif rank == 0:
                    ring._links.send_paths[0].sock.send_multipart(parts)
                for call in (lambda: ring.all_reduce([array]), ring.barrier):
                    call()
                    completed[rank] += 1
            return bool((array == 3.0).all())
        except CollectiveError as error:
            return error

    with ThreadPoolExecutor(2) as pool:
        found = [rank.result(60) for rank in [pool.submit(work, rank) for rank in range(2)]]
    errors = [outcome for outcome in found if isinstance(outcome, CollectiveError)]
    assert False not in found
    # Both fail or none does; but who enters a call late may have all it needs, although the other one has failed in it.
    assert len(errors) != 1 or sorted(completed) == [1, 2], found
    assert abs(completed[0] - completed[1]) <= 1, found
    assert all(len(str(error).splitlines()) == 1 for error in errors)
