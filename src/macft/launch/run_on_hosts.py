"""This machine's rank of a run on several hosts."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from macft.config.schema import TrainConfig
from macft.config.validate import is_elastic
from macft.config.yaml import fingerprint
from macft.membership.join import MemberConfig, form_elastic_ring
from macft.rendezvous.connect import RankConfig, connect
from macft.rendezvous.keystore import Keyring, keyring_for
from macft.rendezvous.server import RendezvousServer
from macft.run.node import run_node
from macft.topology.hosts import own_rank
from macft.topology.settings import host_paths, split_host
from macft.training.stop_request import StopRequest


def run_on_hosts(
    config: TrainConfig, folder: Path, *, resume: bool, stop: StopRequest, keyring: Keyring | None = None
) -> str:
    """Runs this machine's rank of a run on several hosts; returns why it ended.

    ``keyring`` replaces this machine's own keys.
    """
    topology = config.topology
    rank, world_size = own_rank(topology), len(topology.hosts)
    keyring = keyring or keyring_for(topology, config.collective)
    addresses = [split_host(host, topology.port) for host in topology.hosts]
    host, port = addresses[rank]
    paths = host_paths(topology.hosts[rank], port)
    run_id = f"{config.name}:{','.join(topology.hosts)}"
    server: RendezvousServer | None = None
    try:
        if rank == 0:
            server = RendezvousServer(
                f"{host}:{port}",
                world_size=world_size,
                run_id=run_id,
                fingerprint=fingerprint(config),
                timeout=topology.start_timeout,
                keyring=keyring,
                on_refusal=lambda line: print(f"note: {line}", file=sys.stderr),
            )
            server.start()
        rank_config = RankConfig(
            server=f"{addresses[0][0]}:{addresses[0][1]}",
            rank=rank,
            world_size=world_size,
            run_id=run_id,
            fingerprint=fingerprint(config),
            name=topology.hosts[rank],
            timeout=topology.start_timeout,
            keyring=keyring,
        )
        with connect(rank_config, config.collective, bind=bind_addresses(paths, 1)) as ring:
            if not is_elastic(config):
                return run_node(config, ring, folder, resume=resume, stop=stop)
            member_config = MemberConfig(
                bind=bind_addresses(paths, 2),
                ring_bind=bind_addresses(paths, 1),
                name=topology.hosts[rank],
                settings=config.collective,
                keyring=keyring,
                fingerprint=fingerprint(config, of_newcomer=True),
            )
            with form_elastic_ring(ring, member_config) as elastic_ring:
                return run_node(config, elastic_ring, folder, resume=resume, stop=stop)
    finally:
        if server is not None:
            server.close()


def bind_addresses(paths: Sequence[tuple[str, int]], offset: int) -> str:
    """``host:port`` of each cable, joined by ``+``, with ``offset`` added to the port; port 0 stays 0."""
    return "+".join(f"{name}:{port and port + offset}" for name, port in paths)
