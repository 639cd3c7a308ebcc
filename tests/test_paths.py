"""Several cables between two neighbours: frames share them by speed, and the loss of one costs nothing."""

from __future__ import annotations

import contextlib
import json
import logging
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from harness.namespaces import missing_requirement, run, unique_tag
from helpers.cables import two_cables
from helpers.rings import local_listeners, next_message, run_ranks
from macft.collective.base import RingSpeed
from macft.collective.ring.handshake import RingIdentity
from macft.collective.ring.link import Links
from macft.collective.ring.listener import Listener
from macft.collective.ring.ring import Ring
from macft.collective.settings import CollectiveConfig
from macft.collective.wire import Frame, Kind


def reduce_many(calls: int, each: Callable[[int, int], None] | None = None) -> Callable[[Ring], int]:
    """Counts wrong sums over ``calls`` all-reduces, large and small by turns, with blobs in between."""

    def work(ring: Ring) -> int:
        wrong = 0
        expected = sum(range(ring.world_size))
        for turn in range(calls):
            if each is not None:
                each(ring.rank, turn)
            for size in (400_000, 5):
                array = np.full(size, turn + ring.rank, np.float32)
                ring.all_reduce([array])
                wrong += int((array != ring.world_size * turn + expected).any())
            blobs = ring.all_gather(bytes([ring.rank, turn % 256]) * 60_000)
            wrong += blobs != [bytes([rank, turn % 256]) * 60_000 for rank in range(ring.world_size)]
        return wrong

    return work


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
def test_both_cables_carry_and_sums_are_right(world_size: int) -> None:
    with two_cables(world_size) as (listeners, addresses, cables):
        assert run_ranks(listeners, reduce_many(12), addresses=addresses) == [0] * world_size
        assert all(cable.carried > 200_000 for pair in cables for cable in pair)


@pytest.mark.slow
def test_the_faster_cable_carries_more() -> None:
    with two_cables(2) as (listeners, addresses, cables):
        for pair in cables:
            pair[0].bytes_per_second, pair[1].bytes_per_second = 40e6, 5e6
        assert run_ranks(listeners, reduce_many(24), addresses=addresses) == [0, 0]
        for pair in cables:
            assert pair[0].carried > 2 * pair[1].carried


@pytest.mark.slow
def test_the_slow_link_is_found_when_a_ring_is_tuned() -> None:
    def work(ring: Ring) -> RingSpeed | None:
        assert ring.speed is None
        ring.tune()
        return ring.speed

    with two_cables(3) as (listeners, addresses, cables):
        for cable in cables[2]:  # to rank 2, from rank 1
            cable.bytes_per_second = 3e6
        speed, *others = run_ranks(listeners, work, addresses=addresses)
        assert others == [speed, speed]
        assert len(speed.bandwidths) == 3
        assert 1e5 < speed.bandwidths[1] < 10e6
        assert min(speed.bandwidths[0], speed.bandwidths[2]) > 2 * speed.bandwidths[1]
        assert speed.latency > 0


@pytest.mark.slow
@pytest.mark.parametrize("how", ["cut", "silent"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_a_lost_cable_costs_no_row_and_no_run(how: str, world_size: int) -> None:
    with two_cables(world_size) as (listeners, addresses, cables):

        def disturb(rank: int, turn: int) -> None:
            if rank == 0 and turn == 4:
                cable = cables[1][1]
                action = cable.cut if how == "cut" else cable.silent.set
                threading.Timer(0.002, action).start()  # in the middle of a call

        lost: dict[int, list[str]] = {}

        def work(ring: Ring) -> int:
            wrong = reduce_many(12, disturb)(ring)
            lost[ring.rank] = ring.lost_paths
            return wrong

        assert run_ranks(listeners, work, addresses=addresses) == [0] * world_size
        assert lost[0] == [cables[1][1].address]


@pytest.mark.slow
def test_a_cable_that_is_unplugged_from_the_start_is_left_out() -> None:
    with two_cables(2) as (listeners, addresses, cables):
        cables[0][1].cut()
        assert run_ranks(listeners, reduce_many(3), addresses=addresses) == [0, 0]
        assert cables[0][0].carried > 1_000_000


@pytest.mark.parametrize("streams", [False, True])
def test_paths_that_are_all_ready_take_turns(streams: bool) -> None:
    """The left neighbour has sent three frames over each of three paths before the first one is read."""
    config = CollectiveConfig(timeout=20.0, streams=streams)
    with contextlib.ExitStack() as stack:
        listeners = [Listener("+".join(["127.0.0.1:0"] * 3), config) for _ in range(2)]
        for listener in listeners:
            stack.callback(listener.close)
        addresses = [listener.address for listener in listeners]
        identities = [RingIdentity(rank, addresses, (), "test", 0) for rank in range(2)]
        with ThreadPoolExecutor(2) as pool:
            sender, receiver = pool.map(
                lambda listener, identity: Links.connect(listener, identity, stop_reason=str), listeners, identities
            )
        send_frames(sender, count=1)
        assert sorted(receive_paths(receiver, 3)) == [0, 1, 2]  # from here on every path has its stream
        # That the first of three frames is there does not say that the others are: one of ten tries has to do.
        assert any(take_turns(sender, receiver, streams) for _ in range(10))


def take_turns(sender: Links, receiver: Links, streams: bool) -> bool:
    """Whether nine frames, three of them over each path, are read by turns."""
    send_frames(sender, count=3)
    for path in receiver.recv_paths:
        ready = select.select([*path.data_sockets], [], [], 60) if streams else path.sock.poll(60_000)
        assert ready, path.address
    first, second, third, *rest = receive_paths(receiver, 9)
    return {first, second, third} == {0, 1, 2} and rest == [first, second, third] * 2


def send_frames(links: Links, *, count: int) -> None:
    """Sends ``count`` frames over each path; the frame's piece is the path's number."""
    for number, path in enumerate(links.send_paths):
        for _ in range(count):
            path.send(Frame(links.ring.header(Kind.GATHER)._replace(sequence=1, piece=number, length=4), b"body"))
            while path.pending:
                links.sender.flush()


def receive_paths(links: Links, count: int) -> list[int]:
    """The numbers of the paths that the next ``count`` frames were sent over."""
    paths: list[int] = []
    while len(paths) < count:
        frame = links.wait("all-gather 1", left=True, right=False, seconds=1.0)
        if frame is not None:
            paths.append(frame.header.piece)
    return paths


RANK = """
import json, sys
import numpy as np
from macft.collective.ring.listener import Listener
from macft.collective.ring.ring import Ring
from macft.collective.settings import CollectiveConfig

def say(*words):
    print(json.dumps(words), flush=True)

rank = int(sys.argv[1])
listener = Listener(f"10.78.1.{rank + 1}:0+10.78.2.{rank + 1}:0", CollectiveConfig(piece_bytes=65536, timeout=20.0))
say(listener.address)
with Ring(rank, 2, json.loads(sys.stdin.readline()), listener) as ring:
    say(all(path.stream is not None for path in ring._links.send_paths))
    wrong = turn = 0
    over = np.zeros(1)
    while not over[0]:
        array = np.full(1_000_000, turn + rank, np.float32)
        ring.all_reduce([array])
        wrong += int((array != 2 * turn + 1).any())
        turn += 1
        if turn == 20:
            say("in step")
        over[0] = bool(ring.lost_paths) and turn > 20
        ring.all_reduce([over])
    say(wrong, ring.lost_paths)
"""


@pytest.mark.slow
def test_a_real_cable_that_is_pulled_costs_no_sum_and_no_run() -> None:
    """Two machines (network namespaces), two cables between them, a stream on each."""
    if reason := missing_requirement():
        pytest.skip(reason)
    tag = unique_tag()
    names = [f"mp{tag}n{rank}" for rank in (0, 1)]
    with contextlib.ExitStack() as stack:
        for name in names:
            run(f"ip netns add {name}")
            stack.callback(run, f"ip netns del {name}")
        for cable in (1, 2):
            run(f"ip link add c{cable} netns {names[0]} type veth peer name c{cable} netns {names[1]}")
            for rank, name in enumerate(names):
                run(f"ip -n {name} addr add 10.78.{cable}.{rank + 1}/24 dev c{cable}")
                run(f"ip -n {name} link set c{cable} up")
        ranks = [
            subprocess.Popen(
                ["ip", "netns", "exec", name, sys.executable, "-c", RANK, str(rank)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank, name in enumerate(names)
        ]
        for rank in ranks:
            stack.callback(rank.communicate)
            stack.callback(rank.kill)
        addresses = [next_message(rank)[0] for rank in ranks]
        for rank in ranks:
            assert rank.stdin is not None
            print(json.dumps(addresses), file=rank.stdin, flush=True)
        assert [next_message(rank) for rank in ranks] == [[True]] * 2
        assert [next_message(rank) for rank in ranks] == [["in step"]] * 2
        run(f"ip -n {names[0]} link set c2 down")
        told = [next_message(rank, 60) for rank in ranks]
        assert [wrong for wrong, _ in told] == [0, 0]
        lost = {path for _, paths in told for path in paths}
        assert lost
        assert all(path.startswith("10.78.2.") for path in lost)
        assert [rank.wait(60) for rank in ranks] == [0, 0]


@pytest.mark.slow
def test_a_ring_and_its_lost_path_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    """The second path of rank 0 is to a port where nothing listens."""
    caplog.set_level(logging.INFO, "macft")
    listeners = local_listeners(2)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        addresses = [listeners[0].address, f"{listeners[1].address}+127.0.0.1:{unused.getsockname()[1]}"]

        def work(ring: Ring) -> list[str]:
            ring.barrier()
            return ring.lost_paths

        lost, _ = run_ranks(listeners, work, addresses=addresses)
    messages = [record.getMessage() for record in caplog.records if record.name == "macft.ring"]
    assert f"path to {lost[0]} did not come up; the ring uses the others" in messages
    assert sum(message.startswith("ring formed: rank") and addresses[0] in message for message in messages) == 2
    assert sum(message.startswith("ring of generation 0 closed") for message in messages) == 2
