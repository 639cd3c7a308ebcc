"""A rank's process: ``python -m macft.launch.worker FOLDER RANK RENDEZVOUS RUN_ID [--resume]``, run by the launcher.

With ``--join`` it joins the running run in FOLDER.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from macft.cli.run_command import exit_status, run_command
from macft.collective.base import Collective
from macft.config.validate import is_elastic, world_size
from macft.config.yaml import fingerprint, read
from macft.launch.local import watch_launcher
from macft.launch.member import ANY_PORT_HERE, member_config
from macft.logs.run_log import start_log
from macft.membership.join import form_elastic_ring, join_elastic_ring, member_addresses
from macft.rendezvous.connect import RankConfig, connect
from macft.rendezvous.keystore import keyring_for
from macft.run.node import run_node
from macft.training.stop_request import StopRequest


def main(argv: Sequence[str]) -> int:
    """Runs one rank of the run in a folder; returns the exit status."""
    folder, rank, rendezvous, run_id = Path(argv[0]), int(argv[1]), argv[2], argv[3]
    stop = StopRequest()
    launcher_gone = threading.Event()
    watch_launcher(launcher_gone)

    def run() -> str:
        config = read(folder / "config.yaml")
        keyring = keyring_for(config.topology, config.collective)
        name = f"local-{rank}"
        member = member_config(config, ANY_PORT_HERE, name=name, keyring=keyring)
        with ExitStack() as stack:
            stack.enter_context(start_log(folder, rank, config.report.log_level))
            collective: Collective
            if "--join" in argv:
                addresses = member_addresses(str(folder), config.topology.port)
                collective = join_elastic_ring(addresses, member, timeout=config.topology.start_timeout)
            else:
                rank_config = RankConfig(
                    server=rendezvous,
                    rank=rank,
                    world_size=world_size(config),
                    run_id=run_id,
                    fingerprint=fingerprint(config),
                    name=name,
                    timeout=config.topology.start_timeout,
                    keyring=keyring,
                )
                ring = stack.enter_context(connect(rank_config, config.collective))
                collective = form_elastic_ring(ring, member) if is_elastic(config) else ring
            stack.enter_context(collective)
            return run_node(config, collective, folder, resume="--resume" in argv, stop=stop)

    with stop.listening(launcher_gone):
        return exit_status(run())


if __name__ == "__main__":
    sys.exit(run_command(main, interrupted="interrupted; the newest checkpoint is kept"))
