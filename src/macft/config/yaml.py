"""The resolved configuration as YAML, as in a run's folder, and its fingerprint."""

from __future__ import annotations

import hashlib
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from macft.config.schema import TrainConfig
from macft.config.validate import to_plain, to_typed
from macft.errors import ConfigError


def to_yaml(config: TrainConfig) -> str:
    """All keys of ``config`` with their values."""
    return OmegaConf.to_yaml(OmegaConf.create(to_plain(config)))


def read(path: Path) -> TrainConfig:
    """Reads what :func:`to_yaml` wrote.

    Raises:
        ConfigError: The file is not a valid configuration.
    """
    config = OmegaConf.load(path)
    if not isinstance(config, DictConfig):
        raise ConfigError(f"{path}: not a configuration")
    return to_typed(config)


def fingerprint(config: TrainConfig, *, of_newcomer: bool = False) -> str:
    """SHA-256, in hexadecimal, of the settings that must be the same on all nodes; reporting, for instance, may differ.

    Args:
        of_newcomer: Leave out the topology, which may have changed by the time a node joins.
    """
    plain = to_plain(config)
    plain.pop("report")
    plain.pop("plan")
    plain.pop("thermal")  # each Mac may have its own budget
    plain["dataset"].pop("template_time")  # each node has its own at first; the run's is that of rank 0
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
