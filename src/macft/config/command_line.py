"""Prepares the command line for Hydra: short forms, ``resume``, and every configuration error before anything starts.

Overrides, ``-m``, ``--cfg job``, ``--config-dir`` and ``--help`` are Hydra's and work as in its documentation.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hydra import compose
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType
from hydra.errors import HydraException

from macft.config.composing import hydra_at, typed
from macft.config.nearest import schema_keys, unknown_key
from macft.config.paths import config_folder
from macft.config.schema import TrainConfig, register_schema
from macft.config.sweeps import SweepPlan, no_sweep, plan_sweep
from macft.errors import ConfigError
from macft.topology.topology_file import user_config_folder

_FREE_FORM = ("dataset.columns", "optimizer.arguments")
"""Users add keys of their own below these, without Hydra's ``+``."""


@dataclass(frozen=True)
class CommandLine:
    """The arguments for Hydra, the run folder to resume, if any, and what is known of a sweep."""

    argv: list[str]
    resume: Path | None
    sweep: SweepPlan | None = None


def prepare(argv: list[str]) -> CommandLine:
    """Expands macft's short forms, and composes and checks every job of the command without starting it.

    Raises:
        ConfigError: The command is wrong; there is one line for each problem, which names a key.
    """
    register_schema()
    arguments = get_args_parser().parse_intermixed_args(argv)
    overrides: list[str] = arguments.overrides
    flags = _without(argv, overrides)
    asks_for_information = arguments.help or arguments.hydra_help or arguments.info
    if asks_for_information or arguments.shell_completion:
        return CommandLine(argv, None)
    user_folders = [user_config_folder()] if user_config_folder().is_dir() else []
    folders = [config_folder(), *user_folders] + ([Path(arguments.config_dir)] if arguments.config_dir else [])
    if sum(map(bool, (arguments.cfg, arguments.multirun, arguments.run))) > 1:
        raise ConfigError("--cfg, --run and -m: give one of them; --cfg shows the configuration of one run")
    if arguments.resolve and not arguments.cfg:
        raise ConfigError("--resolve: needs --cfg")
    parsed = _parse(overrides)
    is_sweep = arguments.multirun or any(item.input_line == "hydra.mode=MULTIRUN" for item in parsed)
    if not is_sweep:
        no_sweep(parsed)
    resume, others = _take_resume(parsed)
    if resume is not None and is_sweep:
        raise ConfigError("resume: one run at a time; leave -m out")
    rest = [text for override in others for text in _expand(override, folders, resuming=resume is not None)]
    _check_keys(_parse(rest), folders)
    primary, name = config_folder(), arguments.config_name or "train"
    if resume is not None:
        primary, name = resume, "config"
        flags += ["--config-path", str(resume), "--config-name", "config"]
        rest = [f"hydra.run.dir='{resume}'", _search(folders), "hydra/job_logging=stdout", *rest]
    else:
        if any(override.key_or_group == "hydra.searchpath" for override in others):
            user_folders = []
        search = [_search(user_folders)] if user_folders else []
        if arguments.config_dir:  # hydra.main knows this flag, compose doesn't
            searched = _search([Path(arguments.config_dir).absolute(), *user_folders])
            plan = _check(primary, name, [*rest, searched], is_sweep=is_sweep)
            return CommandLine([*flags, *search, *rest], resume, plan)
        rest = [*search, *rest]
    return CommandLine(flags + rest, resume, _check(primary, name, rest, is_sweep=is_sweep))


def _search(folders: list[Path]) -> str:
    return "hydra.searchpath=[" + ",".join(f"'file://{folder}'" for folder in folders) + "]"


def _without(argv: list[str], overrides: list[str]) -> list[str]:
    left = list(argv)
    for override in overrides:
        left.remove(override)
    return left


def _parse(overrides: list[str]) -> list[Override]:
    parser = OverridesParser.create()
    parsed = []
    for text in overrides:
        try:
            parsed.append(parser.parse_override(text))
        except HydraException as error:
            if "=" not in text:
                raise ConfigError(f"{text}: not understood; overrides are written key=value") from error
            key, value = text.split("=", 1)
            raise ConfigError(
                f"{key.lstrip('+')}: the value {value!r} is not in Hydra's syntax; quote it: \"{key}='{value}'\""
            ) from error
    return parsed


def _take_resume(parsed: list[Override]) -> tuple[Path | None, list[Override]]:
    """Separates ``+resume=FOLDER`` (``resume=FOLDER`` is understood too) from the other overrides."""
    chosen = [override for override in parsed if override.key_or_group == "resume"]
    rest = [override for override in parsed if override.key_or_group != "resume"]
    if not chosen:
        return None, rest
    folder = Path(str(chosen[-1].value())).expanduser().absolute()
    if not (folder / "config.yaml").is_file():
        what = "is not a run's folder (it has no config.yaml)" if folder.is_dir() else "does not exist"
        raise ConfigError(f"resume: {folder} {what}; give a run's folder, such as runs/NAME/TIME")
    return folder, rest


def _expand(override: Override, folders: list[Path], *, resuming: bool) -> list[str]:
    """The override in Hydra's form; a short form may become several overrides."""
    text, group = str(override.input_line), override.key_or_group
    if group == "recipe" and not text.startswith(("+", "~")):
        return [f"+{text}"]
    if group in ("model", "dataset"):
        values = _values(override)
        locations = [value for value in values if _is_location(value, group, folders)]
        if locations and len(locations) < len(values):
            (option, *_) = set(values) - set(locations)
            raise ConfigError(
                f"{group}: {option} is a name and {locations[0]} is not; sweep over names, or over ids and paths"
            )
        if locations:
            quoted = ",".join("'" + value.replace("'", "\\'") + "'" for value in values)
            return [f"{'+' if resuming else ''}{group}=custom", f"{group}.path={quoted}"]
    if _is_free_form(group) and not text.startswith(("+", "~")):
        return [f"++{text}"]
    # A resumed run's configuration has no defaults list, so the group is added to it.
    if resuming and "/" not in group and not text.startswith(("+", "~")) and _is_group(group, folders):
        return [f"+{text}"]
    return [text]


def _values(override: Override) -> list[str]:
    if override.is_sweep_override():
        if override.value_type not in (ValueType.CHOICE_SWEEP, ValueType.SIMPLE_CHOICE_SWEEP):
            return []
        return [str(value).strip("'\"") for value in override.sweep_string_iterator()]
    value = override.value()
    return [str(value)] if value is not None else []


def _is_location(value: str, group: str, folders: list[Path]) -> bool:
    """Whether ``model=VALUE`` or ``dataset=VALUE`` means a hub id or a path rather than an option of the group."""
    if any((folder / group / f"{value}.yaml").is_file() for folder in folders):
        return False
    return "/" in value or value.startswith(("~", ".", "builtin:")) or Path(value).exists()


def _is_free_form(key: str) -> bool:
    return key.startswith(_FREE_FORM)


def _is_group(name: str, folders: list[Path]) -> bool:
    return any((folder / name).is_dir() for folder in folders)


def _check_keys(parsed: list[Override], folders: list[Path]) -> None:
    known = set(schema_keys(TrainConfig))
    for override in parsed:
        key = override.key_or_group
        is_hydra = key == "hydra" or key.startswith(("hydra.", "hydra/"))
        if is_hydra or _is_group(key.split("@", 1)[0], folders):
            continue
        if key not in known and not _is_free_form(key) and not key.startswith("dataset.sources"):
            raise ConfigError(unknown_key(key, TrainConfig))


def _check(primary: Path, name: str, overrides: list[str], *, is_sweep: bool) -> SweepPlan | None:
    """Composes and checks the one job there is, or those of a sweep."""
    with hydra_at(primary):
        if is_sweep:
            return plan_sweep(name, overrides)
        typed(compose(name, overrides=overrides))
    return None
