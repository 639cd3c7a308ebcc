"""Configurations from Python, composed and checked as on the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from macft.config.command_line import CommandLine, prepare
from macft.config.overrides import override
from macft.config.schema import TrainConfig
from macft.config.validate import to_typed
from macft.config.yaml import to_yaml
from macft.errors import ConfigError


def compose(recipe: str | None = None, overrides: Sequence[str] = ()) -> TrainConfig:
    """The configuration of ``macft train +recipe=RECIPE OVERRIDES``, each value checked.

    ``macft.compose("llama-lora", ["training.steps=20", "adapter.targets=[q_proj,v_proj]"])``. Nothing is downloaded.
    The result may be changed: :func:`macft.fit` checks it again.

    Args:
        recipe: A file in ``recipes/``, or in a folder of your own; see docs/recipes.md. None: the defaults.
        overrides: As on the command line, without a shell's quotes.

    Raises:
        ConfigError: there is one line for each problem, which names a key.
    """
    config = _prepared([*([override("+recipe", recipe)] if recipe is not None else []), *overrides]).job
    assert config is not None
    return config


def of_run(folder: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """The configuration with which the run in ``folder`` goes on.

    Raises:
        ConfigError: as in :func:`compose`, or the folder is not that of a run.
    """
    config = _prepared([override("+resume", folder), *overrides]).job
    assert config is not None
    return config


def checked(config: TrainConfig) -> TrainConfig:
    """A copy of ``config``, which may have been changed since it was composed.

    Raises:
        ConfigError: a value has the wrong type or can't be right.
    """
    plain = OmegaConf.create(to_yaml(config))
    assert isinstance(plain, DictConfig)
    return to_typed(plain)


def _prepared(overrides: list[str]) -> CommandLine:
    for text in overrides:
        if text.startswith("-"):
            raise ConfigError(f"{text}: give overrides, key=value; options of the command line mean nothing here")
        if text.lstrip("+").startswith("hydra"):
            raise ConfigError(f"{text}: Hydra's own settings mean nothing here; the folder is an argument of macft.fit")
    command = prepare(overrides)
    if command.sweep is not None:
        raise ConfigError("a sweep is made of several configurations: compose and fit each")
    return command
