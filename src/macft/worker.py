"""A rank's process, started by the launcher: ``python -m macft.worker FOLDER RANK RENDEZVOUS RUN_ID [--resume]``."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

from macft.cluster.connect import connect
from macft.cluster.keys import keyring_for
from macft.cluster.local import watch_launcher
from macft.config.validate import world_size
from macft.config.yaml import fingerprint, read
from macft.node import run_node
from macft.status import exit_status
from macft.stop import StopRequest


def main(argv: list[str]) -> int:
    """Runs one rank of the run in a folder; returns the exit status."""
    folder, rank, rendezvous, run_id = Path(argv[0]), int(argv[1]), argv[2], argv[3]
    stop = StopRequest()
    launcher_gone = threading.Event()
    watch_launcher(launcher_gone)

    def run() -> str:
        config = read(folder / "config.yaml")
        with connect(
            rendezvous,
            rank=rank,
            world_size=world_size(config),
            run_id=run_id,
            fingerprint=fingerprint(config),
            name=f"local-{rank}",
            settings=config.collective,
            start_timeout=config.topology.start_timeout,
            keyring=keyring_for(config.topology, config.collective),
        ) as ring:
            outcome = run_node(config, ring, folder, resume="--resume" in argv, stop=stop)
        if rank:
            print(f"{outcome.reason}; adapter sha256 {outcome.adapter_sha256}")
        return outcome.reason

    with stop.listening(launcher_gone):
        return exit_status(run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
