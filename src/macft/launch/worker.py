"""A rank's process: ``python -m macft.launch.worker FOLDER RANK RENDEZVOUS RUN_ID [--resume]``, run by the launcher.

With ``--join`` it joins the running run in FOLDER.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from macft.cli.run_command import exit_status, run_command
from macft.collective.base import Collective
from macft.config.validate import is_elastic, world_size
from macft.config.yaml import must_match, read
from macft.device import fault_points
from macft.launch.local import watch_launcher
from macft.launch.member import ANY_PORT_HERE, member_config
from macft.logs.run_log import start_log
from macft.membership.join import form_elastic_ring, join_elastic_ring, member_addresses
from macft.rendezvous.connect import RankConfig, connect
from macft.rendezvous.keystore import keyring_for
from macft.report.phase_lines import printed_phases
from macft.report.run_folder import RunFolder
from macft.run.claim import after_interrupt
from macft.run.node import run_node
from macft.training.stop_request import StopRequest


def main(argv: Sequence[str]) -> int:
    """Runs one rank of the run in a folder; returns the exit status."""
    folder, rank, rendezvous, run_id = Path(argv[0]), int(argv[1]), argv[2], argv[3]
    fault_points.begin(rank)
    stop = StopRequest(farewell=lambda: after_interrupt(folder))
    watch_launcher(lambda: stop.request(may_quit=False))

    def run() -> str:
        config = read(RunFolder(folder).proposed)
        keyring = keyring_for(config.topology, config.collective)
        name = f"local-{rank}"
        member = member_config(config, ANY_PORT_HERE, name=name, keyring=keyring)
        with ExitStack() as stack:
            stack.enter_context(start_log(folder, rank, config.report.log_level))
            phases = stack.enter_context(printed_phases(is_shown=config.report.console))
            collective: Collective
            if "--join" in argv:
                addresses = member_addresses(str(folder), config.topology.port)
                collective = join_elastic_ring(addresses, member, timeout=config.topology.start_timeout)
            else:
                fault_points.reach("rendezvous")
                rank_config = RankConfig(
                    server=rendezvous,
                    rank=rank,
                    world_size=world_size(config),
                    run_id=run_id,
                    must_match=must_match(config),
                    name=name,
                    timeout=config.topology.start_timeout,
                    keyring=keyring,
                )
                ring = stack.enter_context(connect(rank_config, config.collective))
                phases.begin("joining the other ranks")
                collective = form_elastic_ring(ring, member) if is_elastic(config) else ring
            stack.enter_context(collective)
            return run_node(config, collective, folder, resume="--resume" in argv, stop=stop, phases=phases)

    with stop.listening():
        return exit_status(run())


if __name__ == "__main__":
    sys.exit(run_command(main, interrupted=lambda: after_interrupt(Path(sys.argv[1]))))
