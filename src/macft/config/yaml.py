"""The resolved configuration as YAML, as in a run's folder, and its fingerprint."""

from __future__ import annotations

import hashlib
from dataclasses import fields
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from macft.config.overrides import escaped
from macft.config.schema import TrainConfig
from macft.config.validate import to_plain, to_typed
from macft.errors import ConfigError


def to_yaml(config: TrainConfig) -> str:
    """All keys of ``config`` with their values."""
    return OmegaConf.to_yaml(OmegaConf.create(_escaped(to_plain(config))))


def read(path: Path) -> TrainConfig:
    """Reads what :func:`to_yaml` wrote.

    Raises:
        ConfigError: The file is not a valid configuration.
    """
    config = check_whole(path)
    try:
        return to_typed(config)
    except ConfigError as error:
        raise ConfigError("\n".join(f"{path}: {line}" for line in str(error).splitlines())) from error


def check_whole(path: Path) -> DictConfig:
    """The configuration in ``path``, which :func:`to_yaml` wrote, without a check of its values.

    Raises:
        ConfigError: The file can't be read, or a part is missing: left out, it would silently become the default.
    """
    try:
        config = OmegaConf.load(path)
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror or error}") from error
    except (OmegaConfBaseException, YAMLError, ValueError) as error:
        raise ConfigError(f"{path} is damaged: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(config, DictConfig):
        raise ConfigError(f"{path} is damaged: it holds no configuration")
    if missing := [item.name for item in fields(TrainConfig) if item.name not in config]:
        raise ConfigError(f"{path} is damaged: it has no {', '.join(missing)}")
    return config


def _escaped(value: Any) -> Any:
    """``value`` with each text as OmegaConf has to store it."""
    if isinstance(value, dict):
        return {key: _escaped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    return escaped(value) if isinstance(value, str) else value


def fingerprint(config: TrainConfig, *, of_newcomer: bool = False) -> str:
    """SHA-256, in hexadecimal, of the settings that must be the same on all nodes; reporting, for instance, may differ.

    Args:
        of_newcomer: Leave out the topology, which may have changed by the time a node joins.
    """
    plain = to_plain(config)
    plain.pop("report")
    plain.pop("plan")
    plain.pop("thermal")  # each Mac may have its own budget
    topology = config.topology
    plain["topology"] = {
        "nodes": max(topology.nodes, len(topology.hosts)),
        "shares": topology.shares,
        "rebalance_every": topology.rebalance_every,
        "elastic": topology.elastic,
    }
    if of_newcomer:
        plain.pop("topology")
    return hashlib.sha256(OmegaConf.to_yaml(OmegaConf.create(plain), sort_keys=True).encode()).hexdigest()
