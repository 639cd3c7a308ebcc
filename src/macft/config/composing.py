"""Composes configurations as ``hydra.main`` will, with an error of its own kind in one line."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

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
    except YAMLError as error:
        raise ConfigError(yaml_problem(error)) from error
    except UnicodeDecodeError as error:
        raise ConfigError("a configuration file is not UTF-8 text; save it again as UTF-8") from error
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
    cause = error.__cause__ or error.__context__
    if not isinstance(cause, OmegaConfBaseException):
        return ConfigError(" ".join(str(error).split()))
    if (place := re.match("In '(.+?)':", str(error))) is None:
        return ConfigError(explain(cause))
    # A file of a group, such as recipe/mine.
    if cause.full_key and cause.full_key == place[1].partition("/")[0]:
        return ConfigError(f"{place[1]}: the first line must be: # @package _global_")
    if "with ListConfig" in str(cause):
        return ConfigError(f"{place[1]}: a list, but keys with values belong there")
    return ConfigError(f"{place[1]}: {explain(cause)}")


def yaml_problem(error: YAMLError) -> str:
    """What is wrong with a file's YAML, with its place, on one line."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return " ".join(str(error).split())
    return f"{mark.name}, line {mark.line + 1}: {getattr(error, 'problem', None) or 'not YAML'}"


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
