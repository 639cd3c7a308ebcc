"""Composes configurations as ``hydra.main`` will, with an error of its own kind in one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from macft.config.schema import TrainConfig
from macft.config.validate import explain, to_typed
from macft.errors import ConfigError

_OPTUNA = "hydra/sweeper=optuna: the sweeper is not installed; run: python3 -m pip install hydra-optuna-sweeper"


@contextmanager
def hydra_at(folder: Path) -> Iterator[None]:
    """Makes Hydra compose from the configuration files in ``folder``, while active.

    Raises:
        ConfigError: instead of every error of Hydra and OmegaConf.
    """
    program = GlobalHydra.instance().hydra  # of a program that uses Hydra itself
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(folder.absolute()), job_name="train", version_base="1.3"):
            yield
    except (HydraException, OmegaConfBaseException) as error:
        raise explained(error) from error
    finally:
        GlobalHydra.instance().hydra = program


def typed(config: DictConfig) -> TrainConfig:
    """The checked configuration of a job, from what Hydra composed, with or without Hydra's part.

    Raises:
        ConfigError: as in :func:`~macft.config.validate.to_typed`.
    """
    return to_typed(OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"]))


def explained(error: Exception) -> ConfigError:
    """An error of Hydra or OmegaConf as a user can act on it; a ConfigError as it is."""
    if isinstance(error, ConfigError):
        return error
    if isinstance(error, MissingConfigException):
        return ConfigError(_no_such_option(error))
    cause = error.__cause__
    if isinstance(cause, OmegaConfBaseException):
        return ConfigError(explain(cause))
    return ConfigError(" ".join(str(error).split()))


def _no_such_option(error: MissingConfigException) -> str:
    group, _, option = (error.missing_cfg_file or "").rpartition("/")
    options = [str(item) for item in error.options or []]
    if not group:
        return " ".join(str(error).split())
    if (group, option) == ("hydra/sweeper", "optuna"):
        return _OPTUNA
    near = difflib.get_close_matches(option, options, 1)
    hint = f"did you mean {group}={near[0]}? There are" if near else "there are"
    others = "; or a Hugging Face id (org/name), or a path (./name)" if group in ("model", "dataset") else ""
    return f"{group}: no option '{option}'; {hint} {', '.join(options)}{others}"
