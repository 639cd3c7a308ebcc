"""A run of ``topology=ssh``: which files are sent to the hosts, and where its run folder is there."""

from __future__ import annotations

import posixpath
from pathlib import Path

import macft
from macft.collective.security import KeyPair
from macft.config.paths import config_folder
from macft.config.schema import TrainConfig
from macft.config.validate import is_elastic
from macft.config.yaml import to_yaml
from macft.errors import ConfigError, ModelError
from macft.launch.ssh_launcher import LaunchPlan, launch_over_ssh, show
from macft.model.resolve import resolve
from macft.remote.shipment import Shipment
from macft.rendezvous.keystore import needs_keys
from macft.topology.settings import TopologyConfig


def run_over_ssh(config: TrainConfig, folder: Path, *, resume: bool) -> int:
    """Runs ``config`` on the hosts of its topology, with the results in ``folder``; returns rank 0's exit status.

    Raises:
        MacftError: a host is not ready, or a rank failed.
    """
    return launch_over_ssh(
        LaunchPlan(
            topology=config.topology,
            config=to_yaml(config),
            folder=folder,
            run_folder=_run_folder(folder),
            shipments=shipments(config, resume=resume),
            has_code="code" in config.topology.ship,
            resume=resume,
            replace=config.report.overwrite,
            show=show,
            elastic=is_elastic(config),
            secret=KeyPair.new().secret if needs_keys(config.topology, config.collective) else b"",
        )
    )


def shipments(config: TrainConfig, *, resume: bool = False) -> list[Shipment]:
    """What ``topology.ship`` sends. To ``resume``, the hosts need nothing that isn't found from this working folder.

    They have had it since the run began, and compare its contents with those of then.

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
    path = Path(text).expanduser()
    if not path.is_absolute():
        return posixpath.join(topology.folder, path.as_posix())
    if path.is_relative_to(Path.home()):
        return path.relative_to(Path.home()).as_posix()
    return path.as_posix()


def _run_folder(folder: Path) -> str:
    """The run's folder below ``topology.folder``: its path below the working folder here, or its last two parts."""
    if folder.absolute().is_relative_to(Path.cwd()):
        return folder.absolute().relative_to(Path.cwd()).as_posix()
    return posixpath.join("runs", *folder.parts[-2:])
