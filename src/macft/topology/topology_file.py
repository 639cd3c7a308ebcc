"""Cluster files: ``NAME.yaml`` in the user's configuration folder, read by ``topology=NAME``."""

from __future__ import annotations

import json
import re
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from macft.device.durable import write_atomically
from macft.device.user_folder import user_config_folder
from macft.errors import ConfigError
from macft.topology.settings import TopologyConfig, host_paths, problems

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_RESERVED = ("single", "local", "hosts", "ssh")
_MAX_BYTES = 1_000_000
NO_TOPOLOGY = "not a topology; it needs kind: and hosts:"
"""What is said of a cluster's file that is empty, or has something else in it."""
_HEAD = """\
# The cluster "{name}". Yours to edit: topology={name} reads it each time.
# hosts: address of each machine in ring order, neighbours by the fastest links. ssh: where SSH finds them.
"""


def path_of(name: str) -> Path:
    """The file of the cluster ``name``. Raises ConfigError for an invalid name."""
    if _NAME.fullmatch(name) is None or name in _RESERVED:
        raise ConfigError(
            f"'{name[:80]}' can't name a cluster: letters, digits, dots, dashes; not {', '.join(_RESERVED)}"
        )
    return user_config_folder() / "topology" / f"{name}.yaml"


def names() -> list[str]:
    """All clusters of this user."""
    return sorted(path.stem for path in (user_config_folder() / "topology").glob("*.yaml"))


def load_topology(name: str) -> TopologyConfig:
    """Reads a cluster's file.

    Raises:
        ConfigError: there is none, or it is not a topology; names file and key.
    """
    path = path_of(name)
    if not path.is_file():
        known = ", ".join(names()) or "none yet"
        raise ConfigError(
            f"topology: no cluster '{name}' (there are: {known}); make it: python -m macft.cluster init {name}"
        )
    try:
        loaded = OmegaConf.load(path)
        if not isinstance(loaded, DictConfig):
            raise ConfigError(f"{path}: {NO_TOPOLOGY}")
        if not loaded.get("kind"):
            raise ConfigError(f"{path}: {NO_TOPOLOGY}")
        merged = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(TopologyConfig), loaded))
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())[:200]}") from None
    assert isinstance(merged, TopologyConfig)
    if lines := problems(merged):
        raise ConfigError("\n".join(f"{path}: {line}" for line in lines))
    return merged


def save_topology(name: str, config: TopologyConfig) -> Path:
    """Writes a cluster's file atomically, only with values that differ from the defaults; returns its path."""
    path = path_of(name)
    plain = OmegaConf.to_container(OmegaConf.structured(config))
    defaults = OmegaConf.to_container(OmegaConf.structured(TopologyConfig))
    assert isinstance(plain, dict)
    assert isinstance(defaults, dict)
    kept = {key: value for key, value in plain.items() if key in ("kind", "hosts") or value != defaults[key]}
    text = _HEAD.format(name=name) + OmegaConf.to_yaml(OmegaConf.create(kept))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text)
    return path


def remove_topology(name: str) -> None:
    """Removes a cluster's file. Raises ConfigError if there is none."""
    path = path_of(name)
    if not path.is_file():
        raise ConfigError(f"no cluster '{name}'; there are: {', '.join(names()) or 'none'}")
    path.unlink()


def from_hostfile(path: Path) -> TopologyConfig:
    """Reads a hostfile of ``mlx.launch``: ``[{"ssh": "studio", "ips": ["10.0.0.1"]}, ...]``.

    The list may also be the value of the key ``hosts``.

    Raises:
        ConfigError: it is not one.
    """
    try:
        with path.open("rb") as file:
            content: object = json.loads(file.read(_MAX_BYTES))
    except OSError as error:
        raise ConfigError(f"{path}: can't be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise ConfigError(f"{path}: not JSON; a hostfile of mlx.launch is") from None
    if isinstance(content, dict):
        content = content.get("hosts")
    hosts, ssh = [], []
    for entry in content if isinstance(content, list) else []:
        addresses = entry.get("ips") if isinstance(entry, dict) else None
        destination = entry.get("ssh") if isinstance(entry, dict) else None
        if not isinstance(destination, str):
            raise ConfigError(f'{path}: each host is written {{"ssh": "NAME", "ips": ["ADDRESS"]}}')
        ssh.append(destination)
        paths = [str(item) for item in addresses] if isinstance(addresses, list) else []
        hosts.append("+".join(paths) or destination.split("@")[-1])
    config = TopologyConfig(kind="ssh", nodes=1, hosts=hosts, ssh=ssh)
    if lines := problems(config):
        raise ConfigError("\n".join(f"{path}: {line}" for line in lines))
    return config


def to_hostfile(config: TopologyConfig) -> str:
    """The cluster as a hostfile of ``mlx.launch``."""
    entries = [
        {"ssh": config.ssh_of(rank), "ips": [name for name, _ in host_paths(host, config.port)]}
        for rank, host in enumerate(config.hosts)
    ]
    return json.dumps(entries, indent=2) + "\n"
