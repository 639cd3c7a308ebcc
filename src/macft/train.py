"""``python -m macft.train``: Hydra in, one readable run out.

What a run needs is imported when there is one to start: ``--help`` and a wrong key don't wait for MLX and transformers,
nor does the launcher of a local run, whose ranks are processes of their own.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from macft.cluster.settings import host_paths, split_host
from macft.config.command_line import prepare
from macft.config.paths import config_folder
from macft.config.schema import TrainConfig
from macft.config.validate import is_elastic, to_typed
from macft.config.yaml import fingerprint, to_yaml
from macft.errors import ConfigError
from macft.status import exit_status
from macft.stop import StopRequest

if TYPE_CHECKING:
    from macft.cluster.keys import Keyring


def main() -> None:
    """Parses the command line, lets Hydra compose each job, and trains."""
    try:
        command = prepare(sys.argv[1:])
    except ConfigError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        sys.exit(error.exit_code)
    sys.argv[1:] = command.argv

    def job(config: DictConfig) -> None:
        folder = Path(HydraConfig.get().runtime.output_dir)
        status = exit_status(lambda: run(to_typed(config), folder, resume=command.resume is not None))
        if status:
            sys.exit(status)

    decorate: Callable[[Any], Any] = hydra.main(str(config_folder()), "train", version_base="1.3")
    decorate(job)()


def run(config: TrainConfig, folder: Path, *, resume: bool) -> str:
    """Runs one job in ``folder`` on the nodes of its topology; returns why it ended."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(to_yaml(config))
    if config.topology.join is not None:
        return _join(config, folder, config.topology.join)
    if config.topology.kind == "local" and config.topology.nodes > 1:
        return _run_local(config, folder, resume=resume)
    if config.topology.kind == "ssh":
        from macft.over_ssh import run_over_ssh

        return _ended(run_over_ssh(config, folder, resume=resume))
    stop = StopRequest()
    with stop.listening():
        if config.topology.kind == "hosts":
            return run_on_hosts(config, folder, resume=resume, stop=stop)
        from macft.node import run_node

        if config.collective.backend == "mlx":
            from macft.collective.mlx_group import join_launched, launched

            if launched():
                with join_launched(config.collective) as group:
                    return run_node(config, group, folder, resume=resume, stop=stop)
        from macft.collective.solo import Solo

        with Solo() as alone:
            return run_node(config, alone, folder, resume=resume, stop=stop)


def _run_local(config: TrainConfig, folder: Path, *, resume: bool) -> str:
    from macft.cluster.keys import keyring_for
    from macft.cluster.local import launch
    from macft.model.resolve import resolve

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


def _join(config: TrainConfig, folder: Path, target: str) -> str:
    from macft.cluster.form_team import Place, address_towards, doors_of, join_team
    from macft.cluster.hosts import own_rank
    from macft.cluster.keys import keyring_for
    from macft.node import run_node

    topology = config.topology
    doors = doors_of(target, topology.port)
    is_listed = bool(topology.hosts)
    own = topology.hosts[own_rank(topology)] if is_listed else address_towards(doors[0])
    is_local = own in ("127.0.0.1", "[::1]")
    paths = [(own, 0)] if is_local and not is_listed else host_paths(own, topology.port)
    stop = StopRequest()
    with stop.listening():
        place = Place(
            bind=_ports(paths, 2),
            ring_bind=_ports(paths, 1),
            name=own if is_listed else platform.node() or own,
            settings=config.collective,
            keyring=keyring_for(topology, config.collective),
            fingerprint=fingerprint(config, of_newcomer=True),
        )
        with join_team(doors, place, timeout=topology.start_timeout) as team:
            return run_node(config, team, folder, resume=False, stop=stop)


def _ports(paths: Sequence[tuple[str, int]], after: int) -> str:
    """``host:port`` of each cable, ``after`` ports further; 0 stays 0."""
    return "+".join(f"{name}:{port and port + after}" for name, port in paths)


def _ended(status: int) -> str:
    if status == 0:
        return "finished"
    if status == 130:
        return "interrupted"
    sys.exit(status)  # rank 0 has printed why


def run_on_hosts(
    config: TrainConfig, folder: Path, *, resume: bool, stop: StopRequest, keyring: Keyring | None = None
) -> str:
    """Runs this machine's rank of a run on several hosts; returns why it ended. ``keyring``: if not this machine's."""
    from macft.cluster.connect import connect
    from macft.cluster.form_team import Place, form_team
    from macft.cluster.hosts import own_rank
    from macft.cluster.keys import keyring_for
    from macft.cluster.rendezvous import RendezvousServer
    from macft.node import run_node

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
        with connect(
            f"{addresses[0][0]}:{addresses[0][1]}",
            rank=rank,
            world_size=world_size,
            run_id=run_id,
            fingerprint=fingerprint(config),
            name=topology.hosts[rank],
            settings=config.collective,
            start_timeout=topology.start_timeout,
            bind=_ports(paths, 1),
            keyring=keyring,
        ) as ring:
            if not is_elastic(config):
                return run_node(config, ring, folder, resume=resume, stop=stop)
            place = Place(
                bind=_ports(paths, 2),
                ring_bind=_ports(paths, 1),
                name=topology.hosts[rank],
                settings=config.collective,
                keyring=keyring,
                fingerprint=fingerprint(config, of_newcomer=True),
            )
            with form_team(ring, place) as team:
                return run_node(config, team, folder, resume=resume, stop=stop)
    finally:
        if server is not None:
            server.close()


if __name__ == "__main__":
    main()
