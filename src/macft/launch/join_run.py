"""Joins a running run."""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path

from macft.config.schema import TrainConfig
from macft.device import fault_points
from macft.launch.member import member_config
from macft.launch.run_clock import started
from macft.membership.join import join_elastic_ring, local_address_towards, member_addresses
from macft.rendezvous.keystore import keyring_for
from macft.report.phase_lines import PhaseLines
from macft.run.node import run_node
from macft.topology.hosts import own_rank
from macft.topology.settings import host_paths
from macft.training.stop_request import StopRequest, announce


def join_run(config: TrainConfig, folder: Path, target: str, phases: PhaseLines, *, farewell: Callable[[], str]) -> str:
    """Joins the run of the nodes at ``target`` (a value of ``topology.join``); returns why it ended.

    ``farewell``: see :func:`macft.launch.run.run`.
    """
    topology = config.topology
    fault_points.begin(fault_points.NEWCOMER)
    addresses = member_addresses(target, topology.port)
    is_listed = bool(topology.hosts)
    own = topology.hosts[own_rank(topology)] if is_listed else local_address_towards(addresses[0])
    is_local = own in ("127.0.0.1", "[::1]")
    paths = [(own, 0)] if is_local and not is_listed else host_paths(own, topology.port)
    name = own if is_listed else platform.node() or own
    stop = StopRequest(announce, farewell=farewell)
    with stop.listening():
        member = member_config(config, paths, name=name, keyring=keyring_for(topology, config.collective))
        phases.begin(f"asking {target} to be let in")
        with join_elastic_ring(addresses, member, timeout=topology.start_timeout) as elastic_ring:
            config = started(config, elastic_ring.started)
            return run_node(config, elastic_ring, folder, resume=False, stop=stop, phases=phases)
