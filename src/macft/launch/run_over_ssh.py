"""A run of ``topology=ssh``: which files are sent to the hosts, and where its run folder is there."""

from __future__ import annotations

import posixpath
from dataclasses import replace
from pathlib import Path

import macft
from macft.collective.ring.security import KeyPair
from macft.config.paths import config_folder
from macft.config.schema import TrainConfig
from macft.config.validate import is_elastic
from macft.config.yaml import to_yaml
from macft.errors import ConfigError, ModelError
from macft.launch.remote_config import name_base_model
from macft.launch.ssh_hosts import LaunchPlan
from macft.launch.ssh_launcher import launch_over_ssh, show
from macft.model.fetch.local import find_local
from macft.model.fetch.resolve import resolve
from macft.remote.shipment import Shipment
from macft.rendezvous.keystore import needs_keys
from macft.report.phase_lines import PhaseLines
from macft.report.run_folder import RunFolder
from macft.run.claim import after_interrupt
from macft.run.local_paths import with_paths_of_hosts, with_paths_of_terminal
from macft.topology.settings import TopologyConfig
from macft.training.stop_request import StopRequest, announce


def run_over_ssh(config: TrainConfig, folder: Path, phases: PhaseLines, *, resume: bool) -> int:
    """Runs ``config`` on the hosts of its topology, with the results in ``folder``; returns rank 0's exit status.

    Raises:
        MacftError: a host is not ready, or a rank failed.
    """
    run_folder = _run_folder(folder, config.topology)
    here = with_paths_of_terminal(config)
    here = replace(here, topology=replace(here.topology, paths=here.topology.paths | {str(folder): run_folder}))
    with StopRequest(announce, farewell=lambda: after_interrupt(folder)).listening():
        plan = LaunchPlan(
            topology=config.topology,
            config=to_yaml(with_paths_of_hosts(here)),
            own_config=to_yaml(here),
            folder=folder,
            run_folder=run_folder,
            shipments=shipments(here, resume=resume),
            has_code="code" in config.topology.ship,
            resume=resume,
            replace=config.report.overwrite,
            show=show,
            phases=phases,
            elastic=is_elastic(config),
            secret=KeyPair.new().secret if needs_keys(config.topology, config.collective) else b"",
        )
    status = launch_over_ssh(plan)
    found = find_local(config.model.path)
    name_base_model(RunFolder(folder).adapters, config.model.path if found is None else str(found.absolute()))
    if RunFolder(folder).summary.exists() and folder != Path.cwd() / run_folder:
        show(f"· the results are in {folder}")  # the hosts have named the folder as it is below their own
    return status


def shipments(config: TrainConfig, *, resume: bool = False) -> list[Shipment]:
    """What ``topology.ship`` sends. To ``resume``, the hosts need nothing that is no longer on this machine.

    They have had it since the run began, and compare its contents with those of then.

    Args:
        config: With the paths of this machine; see :mod:`macft.run.local_paths`.
        resume: Whether the run goes on.

    Raises:
        ConfigError: a dataset is not on this machine.
        ModelError: the model is neither on this machine nor can it be downloaded.
    """
    topology = config.topology
    result: list[Shipment] = []
    if "code" in topology.ship:
        code = posixpath.join(topology.folder, "code", "macft")
        result += [
            Shipment(Path(macft.__file__).parent, code),
            Shipment(config_folder(), posixpath.join(code, "configs")),
        ]
    if "data" in topology.ship:
        for source in config.dataset.all_sources():
            if source.path.startswith("builtin:"):
                continue
            path = Path(source.path).expanduser()
            if not path.exists():
                if resume:
                    continue
                raise ConfigError(f"topology.ship: data can't be sent, for '{source.path}' is not on this machine")
            result.append(Shipment(path, destination(source.path, topology)))
    if "model" in topology.ship and (here := _model_folder(config, may_lack=resume)) is not None:
        given = Path(config.model.path).expanduser()
        result.append(Shipment(here, destination(config.model.path if given.is_dir() else str(here), topology)))
        reference = here.parents[1] / "refs" / "main"
        if here.parent.name == "snapshots" and reference.is_file():  # how the Hugging Face cache finds the snapshot
            result.append(Shipment(reference, destination(str(reference), topology)))
    return result


def _model_folder(config: TrainConfig, *, may_lack: bool) -> Path | None:
    try:
        return resolve(config.model).absolute()
    except ModelError:
        if not may_lack:
            raise
        return None


def destination(text: str, topology: TopologyConfig) -> str:
    """Where a path of the configuration is on the hosts. This machine's home folder becomes that of the host."""
    path = Path(topology.paths.get(text, text)).expanduser()
    if not path.is_absolute():
        return posixpath.join(topology.folder, path.as_posix())
    if path.is_relative_to(Path.home()):
        return path.relative_to(Path.home()).as_posix()
    return path.as_posix()


def _run_folder(folder: Path, topology: TopologyConfig) -> str:
    """The run's folder below ``topology.folder``: its path below the working folder in which the run began.

    For another folder, the last two parts of its path.
    """
    if (known := topology.paths.get(str(folder))) is not None:
        return known
    if folder.is_relative_to(Path.cwd()):
        return folder.relative_to(Path.cwd()).as_posix()
    return posixpath.join("runs", *folder.parts[-2:])
