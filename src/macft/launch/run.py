"""Runs one job on the nodes of its topology.

What a rank needs is imported where a rank runs in this process: the launcher of a local run starts without MLX.
"""

from __future__ import annotations

import sys
from pathlib import Path

from macft.config.schema import TrainConfig
from macft.config.validate import is_elastic
from macft.config.yaml import fingerprint, to_yaml
from macft.logs.run_log import start_log
from macft.training.stop import StopRequest


def run(config: TrainConfig, folder: Path, *, resume: bool) -> str:
    """Runs one job in ``folder`` on the nodes of its topology; returns why it ended."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(to_yaml(config))
    if config.topology.join is not None:
        from macft.launch.join import join_run

        with start_log(folder, "joined", config.report.log_level):
            return join_run(config, folder, config.topology.join)
    if config.topology.kind == "local" and config.topology.nodes > 1:
        with start_log(folder, "launcher", config.report.log_level):
            return _run_local(config, folder, resume=resume)
    if config.topology.kind == "ssh":
        from macft.launch.ssh_run import run_over_ssh

        with start_log(folder, "launcher", config.report.log_level):
            return _ended(run_over_ssh(config, folder, resume=resume))
    stop = StopRequest()
    with stop.listening():
        if config.topology.kind == "hosts":
            from macft.launch.hosts import run_on_hosts
            from macft.topology.hosts import own_rank

            with start_log(folder, own_rank(config.topology), config.report.log_level):
                return run_on_hosts(config, folder, resume=resume, stop=stop)
        from macft.run.node import run_node

        if config.collective.backend == "mlx":
            from macft.collective.mlx_group import join_launched, launched

            if launched():
                with (
                    join_launched(config.collective) as group,
                    start_log(folder, group.rank, config.report.log_level),
                ):
                    return run_node(config, group, folder, resume=resume, stop=stop)
        from macft.collective.solo import Solo

        with Solo() as alone, start_log(folder, 0, config.report.log_level):
            return run_node(config, alone, folder, resume=resume, stop=stop)


def _run_local(config: TrainConfig, folder: Path, *, resume: bool) -> str:
    from macft.launch.local import launch
    from macft.model.resolve import resolve
    from macft.rendezvous.keystore import keyring_for

    keyring = keyring_for(config.topology, config.collective)
    resolve(config.model)  # fetched once, here, where its progress can be seen
    status = launch(
        config.topology.nodes,
        folder,
        run_id=folder.name,
        fingerprint=fingerprint(config),
        start_timeout=config.topology.start_timeout,
        resume=resume,
        keyring=keyring,
        elastic=is_elastic(config),
        restart=config.topology.restart,
    )
    return _ended(status)


def _ended(status: int) -> str:
    if status == 0:
        return "finished"
    if status == 130:
        return "interrupted"
    sys.exit(status)  # rank 0 has printed why
