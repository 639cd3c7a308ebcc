"""Ranks find each other, and whoever does not fit is told why."""

from __future__ import annotations

import gc
import logging
import socket
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import msgpack
import numpy as np
import psutil
import pytest
import zmq

import macft
from helpers.waiting import wait_until
from macft.collective.settings import CollectiveConfig
from macft.errors import ConfigError, RendezvousError
from macft.rendezvous.connect import RankConfig, connect_ring, join_rendezvous
from macft.rendezvous.roster import Roster
from macft.rendezvous.server import RendezvousServer
from macft.topology.hosts import own_rank
from macft.topology.settings import TopologyConfig


def serve(world_size: int, timeout: float = 20.0, **more: Any) -> RendezvousServer:
    server = RendezvousServer(world_size=world_size, run_id="run", must_match={"seed": "0"}, timeout=timeout, **more)
    server.start()
    return server


def report(server: RendezvousServer, rank: int, world_size: int, **changed: Any) -> Roster:
    own: dict[str, Any] = {"run_id": "run", "must_match": {"seed": "0"}, "timeout": 20.0, "name": f"node{rank}"}
    own |= {"rank": rank, "world_size": world_size, **changed}
    ring_address = own.pop("ring_address", f"127.0.0.1:{7000 + rank}")
    return join_rendezvous(RankConfig(server.address, **own), ring_address)


def reason(future: Future[Any]) -> str:
    error = future.exception(timeout=60)
    assert isinstance(error, RendezvousError), error
    assert len(str(error).splitlines()) == 1
    return str(error)


def test_every_rank_gets_the_same_table(pool: ThreadPoolExecutor) -> None:
    server = serve(3)
    found = list(pool.map(lambda rank: report(server, rank, 3), (2, 0, 1)))
    assert found[0] == found[1] == found[2] == server.wait()
    assert found[0].addresses == ("127.0.0.1:7000", "127.0.0.1:7001", "127.0.0.1:7002")
    assert found[0].names == ("node0", "node1", "node2")
    server.close()
    server.close()


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (
            {"must_match": {"seed": "1"}},
            "rank 1 (node1) has other settings or versions than the others: seed: 1 instead of 0;",
        ),
        ({"must_match": {}}, "seed: nothing instead of 0; make them the same on all nodes"),
        ({"must_match": {"seed": "0", "more": "x" * 256}}, "rank 1 (node1) sent no valid settings"),
        ({"world_size": 3}, "rank 1 (node1) expects 3 nodes, the others 2"),
        ({"run_id": "old"}, "rank 1 (node1) belongs to run old, the others to run"),
        ({"rank": 2}, "rank 2 (node1) is not one of ranks 0 to 1"),
        ({"rank": -1}, "rank -1 (node1) is not one of ranks 0 to 1"),
        ({"rank": 0}, "rank 0 (node1) arrived twice, from 127.0.0.1:7000 and 127.0.0.1:7001"),
        ({"ring_address": "nowhere"}, "rank 1 (node1) sent no valid name and address"),
    ],
)
def test_a_misfit_ends_it(pool: ThreadPoolExecutor, changed: dict[str, Any], told: str) -> None:
    server = serve(2)
    first = pool.submit(report, server, 0, 2)
    wait_until(lambda: server.arrived)
    second = pool.submit(lambda: report(server, **{"rank": 1, "world_size": 2, **_at(1), **changed}))
    assert told in reason(second)
    assert told in reason(first)
    with pytest.raises(RendezvousError, match="rendezvous at 127"):
        server.wait()
    server.close()


def _at(rank: int) -> dict[str, Any]:
    return {"name": f"node{rank}", "ring_address": f"127.0.0.1:{7000 + rank}"}


def test_another_version_is_refused(pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve(2)
    version = macft.__version__
    monkeypatch.setattr(macft, "__version__", "9.9.9")
    assert f"rank 0 (node0) runs macft 9.9.9, the others {version}" in reason(pool.submit(report, server, 0, 2))
    server.close()


def test_the_missing_rank_is_named_on_both_sides(pool: ThreadPoolExecutor) -> None:
    server = serve(3, timeout=2.0, names=("a", "b", "192.168.0.3"))
    told = "ranks 1 (b), 2 (192.168.0.3) did not arrive within 2 s; is macft running there"
    assert told in reason(pool.submit(report, server, 0, 3))
    with pytest.raises(RendezvousError) as caught:
        server.wait()
    assert told in str(caught.value)
    server.close()


def test_a_rank_that_waits_less_hears_who_is_missing(pool: ThreadPoolExecutor) -> None:
    server = serve(2)
    assert "rank 1 did not arrive" in reason(pool.submit(report, server, 0, 2, timeout=1.0))
    server.close()


def test_nobody_answers() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(RendezvousError, match=f"rendezvous at {address}: no answer within 0.1 s; is macft"):
            join_rendezvous(RankConfig(address, 0, 2, run_id="", must_match={}, name="", timeout=0.1), "a:1")


def test_an_address_in_use_is_named() -> None:
    server = serve(2)
    with pytest.raises(RendezvousError, match=f"can't listen on {server.address}: Address already in use"):
        RendezvousServer(server.address, world_size=2, run_id="run")
    server.close()


def test_a_rank_that_was_started_again_takes_its_place(pool: ThreadPoolExecutor) -> None:
    server = serve(2)
    assert "rank 1 did not arrive" in reason(pool.submit(report, server, 0, 2, timeout=1.0))
    again = pool.submit(report, server, 0, 2, ring_address="127.0.0.1:7099")
    other = pool.submit(report, server, 1, 2)
    assert again.result(60).addresses == other.result(60).addresses == ("127.0.0.1:7099", "127.0.0.1:7001")
    server.close()


def test_a_rendezvous_that_was_started_again_hears_of_those_who_wait(pool: ThreadPoolExecutor) -> None:
    """The node of rank 0 was stopped and started again, and the other one went on waiting."""
    server = serve(2)
    waiting = pool.submit(report, server, 1, 2)
    wait_until(lambda: server.arrived)
    server.close()
    again = RendezvousServer(server.address, world_size=2, run_id="run", timeout=20.0)
    again.start()
    assert report(again, 0, 2) == waiting.result(timeout=60)
    again.close()


def test_strangers_are_ignored(pool: ThreadPoolExecutor) -> None:
    server = serve(2)
    host, port = server.address.split(":")
    with socket.create_connection((host, int(port))) as web, zmq.Context() as context:
        web.sendall(b"GET / HTTP/1.1\r\n\r\n")
        with context.socket(zmq.DEALER) as stranger:
            stranger.linger = 1000
            stranger.connect(f"tcp://{server.address}")
            for garbage in (b"", b"\xff" * 50, msgpack.packb([1]), msgpack.packb({"rank": [1]}), bytes(10)):
                stranger.send(garbage)
            stranger.send_multipart([b"a", b"b", b"c"])
            found = list(pool.map(lambda rank: report(server, rank, 2), (0, 1)))
    assert found[0] == found[1]
    server.close()


def ring_of_three(pool: ThreadPoolExecutor) -> list[list[float]]:
    """Three ranks meet, add up and leave."""
    server = serve(3)

    def work(rank: int) -> list[float]:
        array = np.full(5, rank + 1.0)
        config = RankConfig(
            server.address, rank, 3, run_id="run", must_match={"seed": "0"}, name=f"node{rank}", timeout=20.0
        )
        with connect_ring(config, CollectiveConfig()) as ring:
            ring.all_reduce([array])
        return array.tolist()

    found = list(pool.map(work, range(3)))
    server.close()
    return found


def test_connect_ring_sums_and_leaves_nothing_behind(pool: ThreadPoolExecutor) -> None:
    # The first ring starts pyzmq's thread that frees what was sent without copying; a process keeps that one.
    assert ring_of_three(pool) == [[6.0] * 5] * 3
    gc.collect()  # what earlier tests have left would be closed meanwhile
    threads, descriptors = set(threading.enumerate()), psutil.Process().num_fds()
    assert ring_of_three(pool) == [[6.0] * 5] * 3
    assert {thread.name for thread in set(threading.enumerate()) - threads if "ThreadPool" not in thread.name} == set()
    assert psutil.Process().num_fds() == descriptors


def test_a_refused_rank_frees_its_port() -> None:
    server = serve(2)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        bind = f"127.0.0.1:{probe.getsockname()[1]}"
    config = RankConfig(server.address, 0, 2, run_id="run", must_match={"seed": "1"}, name="", timeout=20.0)
    with pytest.raises(RendezvousError, match="other settings or versions"):
        connect_ring(config, CollectiveConfig(), bind=bind)
    server.close()
    with socket.create_server(("127.0.0.1", int(bind.rpartition(":")[2]))):
        pass


def test_arrivals_and_refusals_are_logged(pool: ThreadPoolExecutor, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "macft.rendezvous")
    server = serve(2)
    first = pool.submit(report, server, 0, 2)
    wait_until(lambda: server.arrived)
    assert "other settings or versions" in reason(pool.submit(report, server, 1, 2, must_match={"seed": "1"}))
    assert "other settings or versions" in reason(first)
    server.close()
    messages = [record.getMessage() for record in caplog.records]
    assert "rank 0 (node0, 127.0.0.1:7000) arrived, 1 of 2" in messages
    assert any(
        message.startswith("rendezvous failed: rank 1 (node1) has other settings or versions") for message in messages
    )


def test_a_list_without_this_machine_names_the_addresses_that_could_be_listed() -> None:
    assert own_rank(TopologyConfig(kind="hosts", hosts=["203.0.113.1", "127.0.0.1"])) == 1
    with pytest.raises(ConfigError, match=r"none of them is this machine \(its addresses: ") as raised:
        own_rank(TopologyConfig(kind="hosts", hosts=["203.0.113.1", "203.0.113.2"]))
    assert "127.0.0.1" not in str(raised.value)
    assert "fe80" not in str(raised.value)
