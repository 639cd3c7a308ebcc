"""This machine's rank of a run on several hosts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from macft.config.schema import TrainConfig
from macft.config.validate import is_elastic
from macft.config.yaml import must_match
from macft.device import fault_points
from macft.launch.member import member_config
from macft.launch.run_clock import started_together
from macft.membership.join import form_elastic_ring
from macft.rendezvous.hosts import connect_hosts
from macft.rendezvous.keystore import Keyring, keyring_for
from macft.report.phase_lines import PhaseLines
from macft.run.node import run_node
from macft.topology.hosts import own_rank
from macft.topology.settings import host_paths, split_host
from macft.training.stop_request import StopRequest


def run_on_hosts(
    config: TrainConfig,
    folder: Path,
    *,
    resume: bool,
    stop: StopRequest,
    phases: PhaseLines,
    keyring: Keyring | None = None,
    on_met: Callable[[], None] = lambda: None,
) -> str:
    """Runs this machine's rank of a run on several hosts; returns why it ended.

    ``keyring`` replaces this machine's own keys. ``on_met`` is called once all nodes have met.
    """
    topology = config.topology
    fault_points.begin(own_rank(topology))
    keyring = keyring or keyring_for(topology, config.collective)
    name = topology.hosts[own_rank(topology)]
    run_id = f"{config.name}:{','.join(topology.hosts)}"
    fault_points.reach("rendezvous")
    phases.end()  # a node that waits for others says for whom
    with connect_hosts(
        topology, config.collective, run_id=run_id, must_match=must_match(config), keyring=keyring
    ) as ring:
        on_met()
        phases.begin("joining the other nodes")
        config = started_together(config, ring)
        if not is_elastic(config):
            return run_node(config, ring, folder, resume=resume, stop=stop, phases=phases)
        paths = host_paths(name, split_host(name, topology.port)[1])
        member = member_config(config, paths, name=name, keyring=keyring)
        with form_elastic_ring(ring, member) as elastic_ring:
            return run_node(config, elastic_ring, folder, resume=resume, stop=stop, phases=phases)
