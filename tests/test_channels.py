"""Channels: messages between any two ranks, in order and unchanged, and an end that names the rank to blame."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from helpers.rings import local_listeners, run_ranks
from helpers.waiting import wait_until
from macft.collective.ring.channel_setup import read_offers
from macft.collective.ring.channels import _MAX_UNREAD, _Incoming
from macft.collective.ring.ring import Ring
from macft.collective.ring.stream import StreamIn
from macft.collective.settings import CollectiveConfig
from macft.collective.solo import Solo
from macft.collective.wire import MAX_MESSAGE_BYTES, Header, Kind, pack
from macft.errors import PeerLost, PeerTimeout, ProtocolError

CONFIG = CollectiveConfig(timeout=20.0, heartbeat=0.2)
PIECE = 64 * 1024
SIZES = (0, 1, 1000, PIECE, 3 * PIECE + 5)


def message(sender: int, number: int) -> bytes:
    return np.random.default_rng([sender, number]).bytes(SIZES[number % len(SIZES)])


def in_threads(
    world_size: int, work: Callable[[Ring], Any], config: CollectiveConfig = CONFIG, *, encrypted: bool = False
) -> list[Any]:
    return run_ranks(local_listeners(world_size, config, encrypted=encrypted), work, catch=Exception)


@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "encrypted"])
def test_messages_go_both_ways_in_order_beside_the_rings_own_calls(encrypted: bool) -> None:
    pairs = [(0, 1), (1, 2), (2, 3), (3, 0), (0, 2)]  # not all of them neighbours

    def work(ring: Ring) -> int:
        channels = ring.open_channels(pairs, "test")
        assert sorted(channels.peers) == [
            peer for peer in range(4) if {(ring.rank, peer), (peer, ring.rank)} & {*pairs}
        ]
        for number in range(2 * len(SIZES)):
            for peer in channels.peers:
                channels.send(peer, 7 + number, message(ring.rank, number))
            total = np.ones(100_000, np.float32)
            ring.all_reduce([total])
            assert (total == 4).all()
            for peer in channels.peers:
                assert bytes(channels.receive(peer, 7 + number)) == message(peer, number)
        return ring.bytes_sent

    config = CollectiveConfig(timeout=20.0, piece_bytes=PIECE)
    sent = in_threads(4, work, config, encrypted=encrypted)
    assert all(isinstance(each, int) and each > 2 * sum(SIZES) for each in sent), sent


def test_a_sender_may_be_far_ahead_and_need_not_wait() -> None:
    count, body = 6 * _MAX_UNREAD, bytes(PIECE)

    def work(ring: Ring) -> None:
        channels = ring.open_channels([(0, 1)], "test")
        if ring.rank == 0:
            for number in range(count):
                channels.send(1, number, body)
        ring.barrier()  # all is sent, and nothing received
        if ring.rank == 1:
            assert all(bytes(channels.receive(0, number)) == body for number in range(count))
        ring.barrier()

    assert in_threads(2, work) == [None, None]


def test_what_is_sent_last_arrives_before_the_end() -> None:
    def work(ring: Ring) -> bytes:
        channels = ring.open_channels([(0, 1)], "test")
        if ring.rank == 0:
            channels.send(1, 0, bytes(4 * PIECE))
            return b""
        return bytes(channels.receive(0, 0))

    assert in_threads(2, work)[1] == bytes(4 * PIECE)


def test_another_message_than_the_one_due_ends_the_ring() -> None:
    def work(ring: Ring) -> None:
        channels = ring.open_channels([(0, 1)], "pipeline")
        if ring.rank == 0:
            channels.send(1, 4, b"hidden states")
        channels.receive(1 - ring.rank, 5)

    first, second = in_threads(2, work)
    assert isinstance(second, ProtocolError)
    assert "sent pipeline message 4, and 5 was due" in str(second)
    assert isinstance(first, ProtocolError)
    assert str(first) == str(second)


def test_all_who_wait_learn_which_rank_has_stopped() -> None:
    """Rank 3 waits for 0, 0 for 1, 1 for 2: only the last of them has a channel to the one that is gone."""

    def work(ring: Ring) -> None:
        channels = ring.open_channels([(0, 1), (1, 2), (3, 0)], "pipeline")
        if ring.rank == 2:
            raise RuntimeError("out of memory")
        channels.receive({3: 0, 0: 1, 1: 2}[ring.rank], 0)

    found = in_threads(4, work)
    for rank in (0, 1, 3):
        assert isinstance(found[rank], PeerLost), found
        assert "rank 2" in str(found[rank])
        assert "out of memory" in str(found[rank])


def test_a_rank_that_does_not_send_is_named() -> None:
    def work(ring: Ring) -> None:
        channels = ring.open_channels([(0, 1)], "pipeline")
        if ring.rank == 0:
            channels.receive(1, 3)
        else:
            ring.barrier()

    first, _ = in_threads(2, work, CollectiveConfig(timeout=20.0, patience=0.3))
    assert isinstance(first, PeerTimeout | PeerLost)  # either rank's patience may end first
    assert "collective.patience" in str(first)


def test_a_world_of_one_has_no_channels() -> None:
    assert not Solo().open_channels([], "pipeline").peers
    with pytest.raises(ValueError, match="alone"):
        Solo().open_channels([(0, 1)], "pipeline")


def test_pairs_are_of_two_ranks_of_the_ring() -> None:
    def refused(ring: Ring) -> None:
        with pytest.raises(ValueError, match="two different ranks"):
            ring.open_channels([(0, 2)], "pipeline")
        ring.barrier()  # it goes on

    assert in_threads(2, refused) == [None, None]


GOOD = Header(Kind.MESSAGE, 3, 1, sequence=9, total=8, piece=0, length=4)


@pytest.mark.parametrize(
    "frames",
    [
        [GOOD._replace(kind=Kind.GATHER)],
        [GOOD._replace(sender=2)],
        [GOOD._replace(generation=4)],
        [GOOD._replace(piece=1)],
        [GOOD._replace(length=9)],
        [GOOD._replace(length=0)],
        [GOOD, GOOD],
        [GOOD, GOOD._replace(piece=1, sequence=10)],
        [GOOD, GOOD._replace(piece=1, total=12)],
        [GOOD, GOOD._replace(piece=1, length=5)],
        [GOOD._replace(total=MAX_MESSAGE_BYTES + 1)],
    ],
)
def test_frames_that_are_not_due_are_refused(frames: list[Header]) -> None:
    near, far = socket.socketpair()
    with far:
        channel = _Incoming(StreamIn(near, 64, None), sender=1, generation=3, name="rank 1 (studio)")
        try:
            far.sendall(b"".join(pack(header) + bytes(header.length) for header in frames))
            wait_until(lambda: channel.has_ended)
            assert channel.take(0) is None
            assert channel.refusal.startswith("rank 1 (studio) sent")
        finally:
            channel.close()


@pytest.mark.parametrize(
    "blob",
    [b"", b"\xff", b"\x80", b"\x81\x02\x90", b"\x81\x02\x91\x92\x01\xc4\x01x", b"\x81\x02\x91\x05", b"\x81\x02\xc0"],
)
def test_offers_that_are_not_valid_are_refused(blob: bytes) -> None:
    with pytest.raises(ValueError, match="no valid offer"):
        read_offers(blob, 2)
