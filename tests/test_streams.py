"""Streams: what is sent arrives, to the right one only; anything else is refused, and a lost stream ends the ring."""

from __future__ import annotations

import contextlib
import gc
import select
import socket
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.network import closed_port
from helpers.rings import local_listeners, run_ranks
from macft.collective.ring.ring import Ring
from macft.collective.ring.stream import SECRET_BYTES, StreamIn, StreamOut, StreamPort, new_buffer
from macft.collective.settings import CollectiveConfig
from macft.collective.wire import DATA_HEADER_BYTES, Header, Kind, pack, unpack
from macft.errors import CollectiveError, PeerLost, ProtocolError

MOST = 200_000
SECRET = bytes(range(SECRET_BYTES))
encryption = pytest.mark.parametrize("secret", [None, SECRET], ids=["plain", "encrypted"])
SIZES = st.one_of(st.integers(0, 200), st.sampled_from([16_343, 16_384, 20_000, MOST]))


def header(number: int, length: int) -> Header:
    return Header(Kind.GATHER, 0, 1, sequence=number + 1, total=length, length=length)


def body(number: int, length: int) -> bytes:
    return np.random.default_rng([number, length]).bytes(length)


def of_peer(data: Any) -> Header:
    return unpack(data, "a peer")


@contextlib.contextmanager
def pair(secret: bytes | None, max_bytes: int = MOST) -> Iterator[tuple[StreamOut, socket.socket, StreamIn]]:
    """A sending end, the socket it ends in, and a receiving end on that."""
    near, far = socket.socketpair()
    sender, receiver = StreamOut(near, max_bytes, secret), StreamIn(far, max_bytes, secret)
    try:
        yield sender, far, receiver
    finally:
        sender.close()
        receiver.close()


def sent(secret: bytes | None, lengths: list[int]) -> bytes:
    """What goes over the wire for frames of these lengths."""
    with pair(secret) as (sender, wire, _):
        data = b""
        for number, length in enumerate(lengths):
            sender.send(pack(header(number, length)), body(number, length))
            while sender.pending or select.select([wire], [], [], 0)[0]:
                data += wire.recv(1 << 20)
                sender.flush()
    return data


def received(secret: bytes | None, data: bytes, step: int = 1 << 16) -> list[tuple[Header, bytes]]:
    """The frames of ``data``, which comes ``step`` bytes at a time; raises what the stream raises."""
    found: list[tuple[Header, bytes]] = []
    with pair(secret) as (sender, _, receiver):
        for start in range(0, len(data), step):
            sender.sock.send(data[start : start + step])
            while (frame := receiver.read(of_peer, new_buffer)) is not None:
                found.append((frame[0], bytes(frame[1])))
    return found


@encryption
@settings(deadline=None, max_examples=40)
@given(st.lists(SIZES, min_size=1, max_size=6), st.sampled_from([7, 1000, 1 << 16]))
def test_frames_arrive_as_they_were_sent(secret: bytes | None, lengths: list[int], step: int) -> None:
    lengths = lengths if step > 100 else [min(length, 300) for length in lengths]
    expected = [(header(number, length), body(number, length)) for number, length in enumerate(lengths)]
    assert received(secret, sent(secret, lengths), step) == expected


@encryption
def test_a_body_is_received_where_it_is_wanted(secret: bytes | None) -> None:
    wanted = np.zeros(MOST, np.uint8)
    with pair(secret) as (sender, _, receiver):
        sender.send(pack(header(0, MOST)), body(0, MOST))
        while (frame := receiver.read(of_peer, lambda _: memoryview(wanted))) is None:
            sender.flush()
    assert frame[1].obj is wanted
    assert wanted.tobytes() == body(0, MOST)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_nothing_on_an_encrypted_stream_can_be_read_changed_repeated_or_left_out(drawn: st.DataObject) -> None:
    lengths = [40, 0, 3000]
    data = sent(SECRET, lengths)
    clear = sent(None, lengths)
    assert not any(clear[at : at + 12] in data for at in range(0, len(clear) - 12, 12))
    frames = [DATA_HEADER_BYTES + 16 + (length + 16 if length else 0) for length in lengths]
    expected = [(header(number, length), body(number, length)) for number, length in enumerate(lengths)]
    attack = drawn.draw(st.sampled_from(["change", "repeat", "leave out", "add"]))
    if attack == "change":
        place = drawn.draw(st.integers(0, len(data) - 1))
        changed = bytearray(data)
        changed[place] ^= drawn.draw(st.integers(1, 255))
    elif attack == "repeat":
        changed = bytearray(data[: frames[0]] + data)
    elif attack == "leave out":
        changed = bytearray(data[frames[0] :])
    else:
        place = drawn.draw(st.integers(0, len(data) - 1))
        changed = bytearray(data[:place] + drawn.draw(st.binary(min_size=1, max_size=50)) + data[place:])
    found: list[tuple[Header, bytes]] = []
    with pair(SECRET) as (sender, _, receiver), contextlib.suppress(ValueError):
        sender.sock.send(changed)
        while (frame := receiver.read(of_peer, new_buffer)) is not None:
            found.append((frame[0], bytes(frame[1])))
    assert found == expected[: len(found)]  # only what came before the attack
    assert len(found) < 3 or attack == "add"


@settings(deadline=None)
@given(st.lists(st.binary(max_size=300), max_size=5), st.booleans())
def test_other_bytes_are_a_frame_or_refused(chunks: list[bytes], starts_well: bool) -> None:
    start = pack(header(0, 100))[:20] if starts_well else b""
    try:
        frames = received(None, start + b"".join(chunks))
    except (ValueError, ProtocolError):
        return
    assert all(len(data) == told.length for told, data in frames)


def test_a_body_beyond_the_limit_is_refused_unread() -> None:
    with pytest.raises(ValueError, match="a body of 200001 bytes; 200000 are the most"):
        received(None, pack(header(0, MOST + 1)))


def test_a_port_lets_in_who_knows_the_secret_and_nobody_else() -> None:
    port = StreamPort("127.0.0.1", encrypted=True)
    where = f"127.0.0.1:{port.port}"
    silent = []
    for _ in range(12):  # more than it listens to
        silent.append(socket.create_connection(("127.0.0.1", port.port)))
        assert port.accept(MOST) is None
    wrong = StreamOut.connect(where, port.port, bytes(SECRET_BYTES), MOST, encrypted=True)
    assert wrong is not None
    assert port.accept(MOST) is None
    right = StreamOut.connect(where, port.port, port.secret, MOST, encrypted=True)
    assert right is not None
    stream = awaited(port)
    right.send(pack(header(0, 3)), b"abc")
    assert select.select([stream.sock], [], [], 60)[0]
    assert stream.read(of_peer, new_buffer) == (header(0, 3), b"abc")
    for other in (wrong.sock, *silent):
        other.settimeout(60)
        with contextlib.suppress(ConnectionError):
            assert other.recv(1) == b""  # shown out
        other.close()
    assert StreamOut.connect(where, port.port, port.secret, MOST, encrypted=True) is None  # once is enough
    right.close()
    stream.close()


def awaited(port: StreamPort) -> StreamIn:
    deadline = time.monotonic() + 60
    while (stream := port.accept(MOST)) is None:
        assert time.monotonic() < deadline
        select.select(port.sockets, [], [], 1)
    return stream


def two_ranks(work: Any, *configs: CollectiveConfig, encrypted: bool = False) -> list[Any]:
    """What ``work`` returns or raises on each rank, whose settings may differ."""
    listeners = [listener for config in configs for listener in local_listeners(1, config, encrypted=encrypted)]
    return run_ranks(listeners, work, catch=CollectiveError)


def right_sums(ring: Ring) -> bool:
    arrays = [np.full(size, ring.rank + 1.0, np.float32) for size in (3, 70_000, 900_000)]
    for array in arrays:
        ring.all_reduce([array])
    total = ring.world_size * (ring.world_size + 1) / 2
    return all(bool((array == total).all()) for array in arrays)


@pytest.mark.parametrize("encrypted", [False, True])
def test_ranks_with_and_without_streams_add_up_together(encrypted: bool) -> None:
    configs = [CollectiveConfig(streams=streams, piece_bytes=256 * 1024) for streams in (True, False, True)]
    assert two_ranks(right_sums, *configs, encrypted=encrypted) == [True] * 3


def test_an_unreachable_port_costs_the_stream_and_not_the_ring() -> None:
    """As behind a firewall that knows ZeroMQ's port only."""
    assert StreamOut.connect("127.0.0.1:1", closed_port(), SECRET, MOST, encrypted=False) is None


@pytest.mark.parametrize("size", [1_000, 900_000])
def test_a_stream_that_breaks_by_itself_ends_the_ring_on_both_sides(size: int) -> None:
    def work(ring: Ring) -> None:
        array = np.ones(size, np.float32)
        ring.all_reduce([array])
        stream = ring._links.send_paths[0].stream
        assert stream is not None
        if ring.rank == 0:
            stream.sock.shutdown(socket.SHUT_RDWR)
        for _ in range(3):
            ring.all_reduce([array])

    config = CollectiveConfig(timeout=20.0)
    found = two_ranks(work, config, config)
    assert [type(error) for error in found] == [PeerLost] * 2, found
    assert all("is gone" in str(error) for error in found)


@settings(max_examples=30, deadline=None)
@given(st.binary(min_size=1, max_size=3000), st.sampled_from([3, 100_000]), st.booleans())
def test_garbage_on_a_stream_of_a_live_ring(garbage: bytes, size: int, encrypted: bool) -> None:
    """The ring ends on both ranks, with one line that names who sent it."""

    def work(ring: Ring) -> bool:
        array = np.full(size, ring.rank + 1.0, np.float32)
        ring.all_reduce([array])
        stream = ring._links.send_paths[0].stream
        assert stream is not None
        if ring.rank == 0:
            stream.sock.send(garbage)
        ring.barrier()
        ring.barrier()  # rank 0 may have had its part of the first one
        return bool((array == 3.0).all())

    config = CollectiveConfig(timeout=20.0, patience=2.0)  # for bytes that look like the beginning of a frame
    found = two_ranks(work, config, config, encrypted=encrypted)
    errors = [outcome for outcome in found if isinstance(outcome, CollectiveError)]
    assert len(errors) == 2, found
    assert all(len(str(error).splitlines()) == 1 for error in errors)


def test_no_socket_is_left() -> None:
    gc.collect()
    process = psutil.Process()
    two_ranks(right_sums, CollectiveConfig(), CollectiveConfig())
    before = process.num_fds()
    for _ in range(5):
        two_ranks(right_sums, CollectiveConfig(), CollectiveConfig())
    assert process.num_fds() <= before + 2
