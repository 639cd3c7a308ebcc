"""Checks a composed configuration before anything is downloaded or loaded."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from macft.collective import settings as collective_settings
from macft.config import plan_settings
from macft.config.nearest import unknown_key
from macft.config.schema import TrainConfig
from macft.data import settings as dataset_settings
from macft.errors import ConfigError
from macft.evaluation.metrics import check_metrics
from macft.model import settings as model_settings
from macft.model.adapters import settings as adapter_settings
from macft.report import settings as report_settings
from macft.thermal import settings as thermal_settings
from macft.topology import settings as topology_settings
from macft.training import settings as training_settings

_VALUE = r"Value (?P<value>'.*') (?:of type '\w+' could not be converted to|is not a valid) "
_PLAINER = {
    _VALUE + "Integer": "{value} is not a whole number, such as 8",
    _VALUE + "Float": "{value} is not a number, such as 1e-4",
    _VALUE + "bool": "{value} is neither true nor false",
    ".* is not a ListConfig, list or tuple": "it must be a list, such as [a,b]",
    ".* is not Optional": "null is not allowed here; it needs a value",
    r'\w+ raised while resolving interpolation: "?(?P<value>.*?)"?$': "{value}",
}
"""What OmegaConf says of a value, and how it is said to a user."""


def to_typed(config: DictConfig) -> TrainConfig:
    """The typed configuration, with each value and their combinations checked.

    Raises:
        ConfigError: There is one line for each problem, which names a key.
    """
    try:
        schema = OmegaConf.structured(TrainConfig)
        merged = OmegaConf.merge(schema, config)
        if missing := sorted(OmegaConf.missing_keys(merged)):
            raise ConfigError(f"{missing[0]}: a value is needed; add {missing[0]}=... to the command")
        typed = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error)) from error
    assert isinstance(typed, TrainConfig)
    check_metrics(typed.dataset)
    if errors := problems(typed):
        raise ConfigError("\n".join(errors))
    return typed


def problems(config: TrainConfig) -> list[str]:
    """One line for each invalid value of any package, then for each invalid combination; no I/O."""
    if infinite := [f"{key}: {value} is not a finite number" for key, value in _not_finite(to_plain(config))]:
        return infinite
    return [
        *model_settings.problems(config.model),
        *dataset_settings.problems(config.dataset),
        *adapter_settings.problems(config.adapter),
        *training_settings.problems(config.training, config.optimizer),
        *topology_settings.problems(config.topology),
        *collective_settings.problems(config.collective),
        *report_settings.problems(config.report),
        *thermal_settings.problems(config.thermal),
        *plan_settings.problems(config.plan),
        *_combinations(config),
    ]


def world_size(config: TrainConfig) -> int:
    """Number of nodes the topology describes."""
    return len(config.topology.hosts) if config.topology.kind in ("hosts", "ssh") else config.topology.nodes


def is_elastic(config: TrainConfig) -> bool:
    """Whether the run continues without a lost node; see ``topology.elastic``."""
    can = config.collective.backend == "ring" and config.training.sync != "diloco"
    return config.topology.elastic and can and (world_size(config) > 1 or config.topology.join is not None)


def _not_finite(plain: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The keys below ``prefix`` whose value is infinite or no number at all."""
    for name, value in plain.items():
        if isinstance(value, Mapping):
            yield from _not_finite(value, f"{prefix}{name}.")
        elif isinstance(value, float) and not math.isfinite(value):
            yield f"{prefix}{name}", value


def _combinations(config: TrainConfig) -> list[str]:
    errors = []
    if any(part.strip() in ("", ".", "..") for part in config.name.split("/")):
        errors.append(
            f"name: {config.name!r} is no name for a run's folder, runs/NAME/TIME; use one such as support-bot"
        )
    if config.seed < 0:
        errors.append(f"seed: {config.seed} must be 0 or more")
    elif config.seed >= 2**63:
        errors.append(f"seed: {config.seed} must be below 2**63")
    if config.training.sync == "diloco" and config.collective.codec == "auto":
        errors.append(
            "collective.codec: auto measures the all-reduce of each step, and training.sync=diloco has none; "
            "use none, bfloat16, int8 or powersgd"
        )
    errors += _placement_combinations(config)
    errors += _deterministic_combinations(config)
    nodes = config.topology.pipelines if config.topology.placement == "pipeline" else _nodes(config)
    what = "pipelines" if config.topology.placement == "pipeline" else "nodes"
    if nodes > config.training.batch_size > 0:
        errors.append(
            f"training.batch_size: {config.training.batch_size} rows can't be shared by {nodes} {what}; "
            f"use {nodes} or more, or fewer {what}"
        )
    if config.adapter.type == "full" and config.model.quantization in ("keep", "4bit", "8bit"):
        errors.append(
            f"adapter.type: full can't train a quantised base (model.quantization={config.model.quantization}); "
            "use model.quantization=none"
        )
    return errors


def _placement_combinations(config: TrainConfig) -> list[str]:
    placement, errors = config.topology.placement, []
    if placement in ("stream", "pipeline") and config.adapter.type == "full":
        errors.append(
            f"topology.placement: {placement} can't train the model's own weights (adapter.type=full); use "
            "adapter=lora, or topology.placement=replicate"
        )
    if placement != "pipeline":
        return errors
    errors += topology_settings.pipeline_problems(config.topology, _nodes(config))
    if config.training.sync == "diloco":
        errors.append(
            "topology.placement: a pipeline's nodes exchange hidden states in every step, and training.sync=diloco is "
            "for nodes that rarely meet; use topology.placement=stream"
        )
    if config.collective.backend == "mlx":
        errors.append("topology.placement: pipeline works on collective=ring only")
    elif not config.collective.streams:
        errors.append("topology.placement: pipeline needs collective.streams=true; hidden states travel over them")
    return errors


def _nodes(config: TrainConfig) -> int:
    """Those of the run, or of its plan."""
    return plan_settings.planned_nodes(config.plan) or world_size(config)


def _deterministic_combinations(config: TrainConfig) -> list[str]:
    if not config.training.deterministic:
        return []
    obstacles = [
        (config.training.sync == "diloco", "training.sync=diloco, with which nodes learn by themselves"),
        (
            config.collective.codec != "none",
            f"collective.codec={config.collective.codec}, which rounds sums on their way",
        ),
        (config.topology.batch == "auto", "topology.batch=auto, which chooses by free memory"),
        (config.adapter.type == "full", "adapter=full, whose sums would need 16 bytes for each weight"),
    ]
    return [f"training.deterministic: does not go with {what}" for applies, what in obstacles if applies]


def explain(error: OmegaConfBaseException) -> str:
    """An OmegaConf error as one line that begins with the key."""
    key = getattr(error, "full_key", None) or getattr(error, "key", None)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = lines[0] if lines else type(error).__name__
    for wrong, words in _PLAINER.items():
        if key and (found := re.match(wrong, first)):
            return f"{key}: {words.format(**found.groupdict())}"
    if (
        key
        and not isinstance(error, InterpolationResolutionError)
        and ("not in" in first or "not found" in first.lower())
    ):
        return unknown_key(str(key), TrainConfig)
    return f"{key}: {first}" if key else first


def to_plain(config: TrainConfig) -> dict[str, Any]:
    """The resolved configuration as plain dicts, lists and scalars."""
    return asdict(config)
