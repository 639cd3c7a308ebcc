"""The resolved configuration as YAML, as in a run's folder, and what of it all nodes must have alike."""

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
from macft.remote.host_probe import versions

_DECIDING_PACKAGES = ("mlx", "mlx-lm")
_MAX_VALUE = 100


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


def must_match(config: TrainConfig, *, of_newcomer: bool = False) -> dict[str, str]:
    """What must be the same on all nodes before they meet, as texts by name: settings, and versions of packages.

    Where a node keeps its model and its dataset is its own matter: their contents are compared, once they are read; see
    :mod:`macft.run.contents`. Reporting, for instance, may differ, too.

    Args:
        of_newcomer: Leave out the topology, which may have changed by the time a node joins.
    """
    plain = to_plain(config)
    samples = plain["report"]["samples"]  # all nodes answer some of them
    for group in ("report", "plan", "thermal", "topology"):  # each Mac may have its own budget of heat
        plain.pop(group)
    plain["report"] = {"samples": samples}
    dataset, model, adapter = plain["dataset"], plain["model"], plain["adapter"]
    dataset.pop("template_time")  # each node has its own at first; the run's is that of rank 0
    dataset.pop("metric_folder")
    model.pop("revision")
    for source in (model, dataset, *dataset["sources"]):
        source.pop("path")
    adapter["init_from"] = adapter["init_from"] is not None  # rank 0 reads it and sends what is in it
    if not of_newcomer:
        topology = config.topology
        plain["topology"] = {
            "nodes": max(topology.nodes, len(topology.hosts)),
            "shares": topology.shares,
            "rebalance_every": topology.rebalance_every,
            "elastic": topology.elastic,
        }
    return {key: _text(value) for key, value in _flat(plain)} | package_versions()


def package_versions() -> dict[str, str]:
    """The versions of packages that decide what a step computes, by name; macft's own is compared with the protocol."""
    installed = versions(list(_DECIDING_PACKAGES))
    return {f"the version of {name}": installed[name] for name in _DECIDING_PACKAGES}


def _flat(plain: dict[str, Any]) -> list[tuple[str, Any]]:
    """``("seed", 0), ("model.precision", "auto"), ...``."""
    return [
        (f"{group}.{key}" if key else group, value)
        for group, values in plain.items()
        for key, value in (values.items() if isinstance(values, dict) else [("", values)])
    ]


def _text(value: Any) -> str:
    """``value`` for a message; a long one is cut, with a digest of the whole."""
    text = str(value)
    if len(text) <= _MAX_VALUE:
        return text
    return f"{text[:_MAX_VALUE]}... ({hashlib.sha256(text.encode()).hexdigest()[:8]})"
