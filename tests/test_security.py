"""Only trusted machines take part, and whoever is refused is told what mends it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from macft.cluster import keys
from macft.cluster.keys import Keyring
from macft.cluster.rendezvous import RendezvousServer, connect_ring
from macft.collective.security import KeyPair
from macft.collective.settings import CollectiveConfig
from macft.errors import RendezvousError

QUICK = CollectiveConfig(timeout=3.0, heartbeat=0.5)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as executor:
        yield executor


def keyrings(count: int) -> list[Keyring]:
    """Machines that trust each other."""
    pairs = [KeyPair.new() for _ in range(count)]
    return [
        Keyring(own, {f"mac{i}": other.public for i, other in enumerate(pairs) if other is not own}) for own in pairs
    ]


def serve(keyring: Keyring | None, world_size: int, told: list[str], timeout: float = 30.0) -> RendezvousServer:
    server = RendezvousServer(
        world_size=world_size,
        run_id="run",
        fingerprint="f",
        timeout=timeout,
        keyring=keyring,
        on_refusal=told.append,
    )
    server.start()
    return server


def add_up(server: RendezvousServer, keyring: Keyring | None, rank: int, world_size: int) -> list[float]:
    """Meets the others, and sums a small and a large array with them."""
    with connect_ring(
        server.address,
        rank=rank,
        world_size=world_size,
        run_id="run",
        fingerprint="f",
        name=f"node{rank}",
        settings=QUICK,
        start_timeout=30.0,
        keyring=keyring,
    ) as ring:
        small, large = np.full(3, rank + 1.0), np.full(1_000_000, rank + 1.0, np.float32)
        ring.all_reduce([small])
        ring.all_reduce([large])
        assert (large == large[0]).all()
        return [*small.tolist(), float(large[0])]


def reason(future: Future[Any]) -> str:
    error = future.exception(timeout=60)
    assert isinstance(error, RendezvousError), error
    assert len(str(error).splitlines()) == 1
    return str(error)


@pytest.mark.parametrize("world_size", [2, 3])
def test_machines_that_trust_each_other_add_up(pool: ThreadPoolExecutor, world_size: int) -> None:
    rings, told = keyrings(world_size), list[str]()
    server = serve(rings[0], world_size, told)
    found = list(pool.map(lambda rank: add_up(server, rings[rank], rank, world_size), range(world_size)))
    total = world_size * (world_size + 1) / 2
    assert found == [[total] * 4] * world_size
    assert told == []
    server.close()
    assert len(set(server.wait().keys)) == world_size


def test_an_unknown_key_is_refused_and_both_sides_say_what_mends_it(pool: ThreadPoolExecutor) -> None:
    rings, told = keyrings(2), list[str]()
    stranger = Keyring(KeyPair.new(), rings[1].trusted)  # it knows the server, the server does not know it
    server = serve(rings[0], 2, told)
    members = [pool.submit(add_up, server, rings[0], 0, 2)]
    key = stranger.own.public.hex()
    text = reason(pool.submit(add_up, server, stranger, 1, 2))
    assert text == (
        f"rendezvous at {server.address}: it does not trust this machine's key; run there: "
        f"python -m macft.keys trust {keys.own_name()} {key}"
    )
    # The run waits on for the rank that belongs to it.
    members.append(pool.submit(add_up, server, rings[1], 1, 2))
    assert [member.result(60) for member in members] == [[3.0] * 4] * 2
    server.close()
    assert told == [
        "127.0.0.1 came with a key that is not trusted here; if `python -m macft.keys show` prints "
        f"{key} there, run `python -m macft.keys trust NAME {key}` here"
    ]


def test_a_server_that_is_not_trusted_hears_nothing(pool: ThreadPoolExecutor) -> None:
    rings, told = keyrings(2), list[str]()
    impostor = Keyring(KeyPair.new(), rings[0].trusted)
    server = serve(impostor, 2, told)
    text = reason(pool.submit(add_up, server, rings[1], 1, 2))
    assert "its key is none that is trusted here (mac0); run `python -m macft.keys show` there" in text
    assert server.arrived == ()
    server.close()


@pytest.mark.parametrize("server_encrypts", [True, False])
def test_one_that_encrypts_and_one_that_does_not_tell_each_other(
    pool: ThreadPoolExecutor, server_encrypts: bool
) -> None:
    rings, told = keyrings(2), list[str]()
    server = serve(rings[0] if server_encrypts else None, 2, told, timeout=2.0)
    text = reason(pool.submit(add_up, server, None if server_encrypts else rings[1], 1, 2))
    how = ("it encrypts", "does not") if server_encrypts else ("it does not encrypt", "does")
    assert f"{how[0]}, this node {how[1]}; set collective.encryption alike" in text
    with pytest.raises(RendezvousError, match="ranks 0, 1 did not come within 2 s"):
        server.wait()
    server.close()
    assert server.arrived == ()
    # Which of the two finds the difference first is chance; the other one may only see the connection end.
    assert all("is collective.encryption the same on all nodes?" in line for line in told)
