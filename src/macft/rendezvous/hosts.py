"""The meeting of ranks on the hosts that ``topology.hosts`` lists."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from macft.collective.base import Collective
from macft.collective.matching import Texts
from macft.collective.settings import CollectiveConfig
from macft.rendezvous.connect import RankConfig, connect
from macft.rendezvous.keystore import Keyring
from macft.rendezvous.server import RendezvousServer
from macft.topology.hosts import own_rank
from macft.topology.settings import TopologyConfig, host_paths, split_host


@contextmanager
def connect_hosts(
    topology: TopologyConfig, settings: CollectiveConfig, *, run_id: str, must_match: Texts, keyring: Keyring | None
) -> Iterator[Collective]:
    """The collective of all hosts, this machine's rank among them; rank 0 also serves the rendezvous.

    Raises:
        RendezvousError, CollectiveError: the ranks do not come together within ``topology.start_timeout``.
    """
    rank, world_size = own_rank(topology), len(topology.hosts)
    host, port = split_host(topology.hosts[rank], topology.port)
    server_host, server_port = split_host(topology.hosts[0], topology.port)
    with ExitStack() as stack:
        if rank == 0:
            server = RendezvousServer(
                f"{host}:{port}",
                world_size=world_size,
                run_id=run_id,
                must_match=must_match,
                timeout=topology.start_timeout,
                names=topology.hosts,
                keyring=keyring,
                on_refusal=lambda line: print(f"note: {line}", file=sys.stderr),
            )
            stack.callback(server.close)
            server.start()
        rank_config = RankConfig(
            server=f"{server_host}:{server_port}",
            rank=rank,
            world_size=world_size,
            run_id=run_id,
            must_match=must_match,
            name=topology.hosts[rank],
            timeout=topology.start_timeout,
            keyring=keyring,
            names=topology.hosts,
            on_waiting=lambda line: print(f"note: {line}", file=sys.stderr, flush=True),
        )
        bind = bind_addresses(host_paths(topology.hosts[rank], port), 1)
        yield stack.enter_context(connect(rank_config, settings, bind=bind))


def bind_addresses(paths: Sequence[tuple[str, int]], offset: int) -> str:
    """``host:port`` of each cable, joined by ``+``, with ``offset`` added to the port; port 0 stays 0."""
    return "+".join(f"{name}:{port and port + offset}" for name, port in paths)
