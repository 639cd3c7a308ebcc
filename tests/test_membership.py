"""Membership services and elastic rings with real sockets and threads: loss, return, fencing, strangers."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace

import msgpack
import numpy as np
import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from helpers.members import SETTINGS, Node
from helpers.waiting import wait_until
from macft.collective.ring.security import KeyPair
from macft.errors import MembershipChanged, RendezvousError
from macft.membership import heartbeat_codec
from macft.membership.elastic_ring import ElasticRing
from macft.membership.join import MemberConfig, join_elastic_ring
from macft.membership.paxos import Ballot, Heartbeat, MemberRecord, View, Vote
from macft.membership.service import join_request
from macft.rendezvous.keystore import Keyring


@pytest.fixture(params=["plain", "encrypted"])
def nodes(request: pytest.FixtureRequest) -> Iterator[list[Node]]:
    """Three nodes in the ring of generation 1."""
    pair = KeyPair.new()
    found = [Node(f"n{rank}", Keyring(pair, {}) if request.param == "encrypted" else None) for rank in range(3)]
    with ExitStack() as stack:
        for node in found:
            stack.callback(node.close)
        view = View(0, tuple(node.membership.own for node in found))
        for node in found:
            node.enter(view, b"secret of this run")
        for change in [node.regroup() for node in found]:
            assert change.result(60).generation == 1
        yield found


def sums(nodes: list[Node]) -> list[float]:
    """Everyone adds 1 + its rank."""

    def add(ring: ElasticRing) -> float:
        array = np.full(5, 1.0 + ring.rank)
        ring.all_reduce([array])
        return float(array[0])

    return [future.result(60) for future in [node.thread.submit(add, node.ring) for node in nodes]]


def test_a_node_that_leaves_is_named_and_the_others_make_a_new_ring(nodes: list[Node]) -> None:
    assert sums(nodes) == [6.0, 6.0, 6.0]
    nodes[0].close()
    waiting = [node.thread.submit(node.ring.barrier) for node in nodes[1:]]
    for call in waiting:
        with pytest.raises(MembershipChanged):
            call.result(60)
    changes = [call.result(60) for call in [node.regroup() for node in nodes[1:]]]
    assert [change.names for change in changes] == [("n1", "n2")] * 2
    assert changes[0].why == {nodes[0].membership.own.id: "its process ended"}
    assert sums(nodes[1:]) == [3.0, 3.0]


def test_a_newcomer_is_let_in_when_all_stop_for_it(nodes: list[Node]) -> None:
    newcomer = Node("n3", nodes[0].keyring)
    try:
        ring = nodes[1].ring
        assert ring is not None
        newcomer.enter(nodes[1].membership.state.view, b"secret of this run")
        assert newcomer.ring is not None
        assert not newcomer.ring.is_member
        entry = newcomer.regroup()
        wait_until(lambda: all(node.ring is not None and node.ring.wants_change for node in nodes))
        assert sums(nodes) == [6.0, 6.0, 6.0]  # nothing happens before they stop
        changes = [call.result(60) for call in [*[node.regroup() for node in nodes], entry]]
        assert [change.names for change in changes] == [("n0", "n1", "n2", "n3")] * 4
        assert sums([*nodes, newcomer]) == [10.0] * 4
    finally:
        newcomer.close()


@pytest.mark.slow
def test_one_that_was_dropped_learns_it_and_comes_back_as_the_last(nodes: list[Node]) -> None:
    """The first loses its ring alone, as a node does that wakes from sleep: the others are in another generation."""
    stale = nodes[0]
    assert stale.ring is not None
    stale.membership._stop.set()  # asleep: neither sends nor receives heartbeats
    stale.membership._thread.join()
    changes = [call.result(60) for call in [node.regroup() for node in nodes[1:]]]
    assert changes[0].why == {stale.membership.own.id: "silent for 5 s"}
    stale.membership._stop.clear()
    stale.membership._thread = threading.Thread(target=stale.membership._serve, daemon=True)
    stale.membership._thread.start()
    wait_until(lambda: "continued without this one" in stale.membership.state.ring_failure)
    with pytest.raises(MembershipChanged, match="continued without this one"):
        stale.ring.check()
    assert sums(nodes[1:]) == [3.0, 3.0]
    entry = stale.regroup()
    wait_until(lambda: all(node.ring is not None and node.ring.wants_change for node in nodes[1:]))
    changes = [call.result(60) for call in [*[node.regroup() for node in nodes[1:]], entry]]
    assert [change.names for change in changes] == [("n1", "n2", "n0")] * 3
    assert sums([nodes[1], nodes[2], nodes[0]]) == [6.0] * 3


def test_strangers_learn_and_change_nothing() -> None:
    node = Node("n0", None)
    node.enter(View(0, (node.membership.own,)), b"secret of this run")
    try:
        foreign = MemberRecord("f" * 16, "foreign", "127.0.0.1:1")
        higher = View(9, (foreign,))
        with zmq.Context() as context, context.socket(zmq.DEALER) as sock:
            sock.linger = 0
            sock.connect(f"tcp://{node.membership.own.address}")
            sock.send(heartbeat_codec.encode_heartbeat(Heartbeat(foreign, higher, ready=True), b"another secret"))
            sock.send(b"\xc1 not msgpack")
            sock.send(msgpack.packb({"join": 1}))
            sock.send(join_request({"seed": "1"}))
            assert sock.poll(60_000)
            assert "differ from the run's: seed: 1 instead of 0;" in msgpack.unpackb(sock.recv())["refused"]
            sock.send(msgpack.packb({**msgpack.unpackb(join_request({})), "must_match": [1]}))
            assert sock.poll(60_000)
            assert "no valid settings" in msgpack.unpackb(sock.recv())["refused"]
            node.membership.contents = {"training rows": "40 rows"}
            sock.send(join_request({"seed": "0"}))
            assert sock.poll(60_000)
            answer = msgpack.unpackb(sock.recv())
            assert (answer["secret"], answer["started"], heartbeat_codec.decode_view(answer["view"])) == (
                b"secret of this run",
                "at noon",
                node.membership.state.view,
            )
            assert answer["contents"] == {"training rows": "40 rows"}
            assert not sock.poll(100)
        assert node.membership.state.view.generation == 0
        assert not node.membership.state.candidates
    finally:
        node.close()


def test_silent_nodes_do_not_make_this_one_silent() -> None:
    """Twelve nodes accept no connections, as behind a firewall; another one still gets heartbeats in time."""
    with ExitStack() as stack:
        context = stack.enter_context(zmq.Context())
        live: zmq.Socket[bytes] = stack.enter_context(context.socket(zmq.ROUTER))
        live_port = live.bind_to_random_port("tcp://127.0.0.1")
        silent = stack.enter_context(socket.socket())
        silent.bind(("127.0.0.1", 0))  # refuses connections until it listens
        host, port = silent.getsockname()
        node = Node("n0", None)
        stack.callback(node.close)
        others = [MemberRecord("live", "live", f"127.0.0.1:{live_port}")]
        others += [MemberRecord(f"silent{number}", "silent", f"{host}:{port}") for number in range(12)]
        node.enter(View(0, (node.membership.own, *others)), b"secret of this run")
        wait_until(lambda: "silent is lost" in node.membership.state.ring_failure)
        silent.listen(0)
        for _ in range(4):  # fills the queue of connections; later ones are not answered
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex((host, port))
        while live.poll(0):
            live.recv_multipart()
        for _ in range(30):
            assert live.poll(int(SETTINGS.timeout * 1000)), "no heartbeat within the timeout"
            live.recv_multipart()


@pytest.mark.parametrize("reply", [{"refused": "\x1b[2Jno"}, {"refused": 7}, {"view": []}, [1], b"\xc1"])
def test_an_invalid_reply_to_a_join_request_does_not_reach_the_terminal(reply: object) -> None:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as server, ThreadPoolExecutor(1) as pool:
        address = f"127.0.0.1:{server.bind_to_random_port('tcp://127.0.0.1')}"
        config = MemberConfig("127.0.0.1:0", "127.0.0.1:0", "n1", SETTINGS, None, {"seed": "0"})
        joining = pool.submit(join_elastic_ring, [address], config, timeout=20.0)
        assert server.poll(60_000)
        peer, _ = server.recv_multipart()
        server.send_multipart([peer, reply if isinstance(reply, bytes) else msgpack.packb(reply)])
        with pytest.raises(RendezvousError, match=f"invalid reply from {address}: not a macft membership service"):
            joining.result(60)


texts = st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=20)
members = st.builds(
    MemberRecord,
    texts,
    texts,
    st.just("host:1+other:2"),
    st.sampled_from([b"", b"k" * 32]),
    st.sampled_from(["", "h:3"]),
    st.just(b""),
)
views = st.builds(
    View, st.integers(0, 1 << 40), st.lists(members, min_size=1, max_size=4, unique_by=lambda s: s.id).map(tuple)
)
ballots = st.builds(Ballot, st.integers(0, 1 << 40), texts)
votes = st.builds(Vote, ballots, views)


@pytest.mark.slow
@given(
    st.builds(
        Heartbeat,
        members,
        views,
        st.lists(texts, max_size=4).map(tuple),
        st.booleans(),
        st.none() | ballots,
        st.none() | votes,
        st.none() | ballots,
        st.none() | votes,
        st.integers(0, 1 << 40),
    )
)
def test_a_heartbeat_comes_back_as_it_was(heartbeat: Heartbeat) -> None:
    assert heartbeat_codec.decode_heartbeat(heartbeat_codec.encode_heartbeat(heartbeat, b"s"), b"s") == heartbeat
    assert heartbeat_codec.decode_heartbeat(heartbeat_codec.encode_heartbeat(heartbeat, b"s"), b"t") is None


parts = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 1 << 63) | texts | st.binary(max_size=33),
    lambda inner: st.lists(inner, max_size=9),
    max_leaves=20,
)


@pytest.mark.slow
@given(
    st.binary(max_size=300)
    | st.lists(parts, max_size=10)
    .map(msgpack.packb)
    .map(lambda data: heartbeat_codec._authentication(data, b"s") + data)
)
def test_anything_else_is_ignored(data: bytes) -> None:
    assert heartbeat_codec.decode_heartbeat(data, b"s") is None


def test_a_recorded_heartbeat_changes_nothing_as_it_was_or_changed(nodes: list[Node]) -> None:
    """Without encryption others on the network read heartbeats. A node that has ended must not seem to live on."""
    recorded = nodes[0].membership._paxos.heartbeat(0.0)
    data = heartbeat_codec.encode_heartbeat(recorded, b"secret of this run")
    nodes[0].close()
    waiting = [node.thread.submit(node.ring.barrier) for node in nodes[1:]]
    for call in waiting:
        with pytest.raises(MembershipChanged):
            call.result(60)
    now = 1e9
    paxos = nodes[1].membership._paxos
    before = dict(paxos._last_heard)
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= 1
        assert heartbeat_codec.decode_heartbeat(bytes(changed), b"secret of this run") is None
    earlier = heartbeat_codec.decode_heartbeat(data, b"secret of this run")
    assert earlier is not None
    newest = paxos._heartbeats[earlier.sender.id].number
    paxos.receive(replace(earlier, number=newest), now)
    assert paxos._last_heard == before


def test_nodes_at_rest_do_not_answer_each_other_as_fast_as_they_can(nodes: list[Node]) -> None:
    """Each sends ten heartbeats a second here, so its thread wakes about thirty times a second."""
    paxos = nodes[0].membership._paxos
    first, began = paxos._sent, time.monotonic()
    wait_until(lambda: paxos._sent >= first + 60)
    assert time.monotonic() - began > 0.5


def test_views_and_reasons_are_logged(nodes: list[Node], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "macft.membership")
    nodes[0].close()
    for change in [node.regroup() for node in nodes[1:]]:
        change.result(60)
    messages = {record.getMessage() for record in caplog.records if record.name == "macft.membership"}
    assert "view 2 adopted: n1, n2; n0 left (its process ended)" in messages
    assert any(message.startswith("view 2 proposed: n1, n2 (ballot") for message in messages)
    assert not any("secret of this run" in record.getMessage() for record in caplog.records)
