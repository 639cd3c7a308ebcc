"""Prepares the command line for Hydra: short forms, ``resume``, and every configuration error before anything starts.

Overrides, ``-m``, ``--cfg job``, ``--config-dir`` and ``--help`` are Hydra's and work as in its documentation.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from hydra import compose
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from macft.cli.shell import command
from macft.config.composing import hydra_at, typed
from macft.config.mangled import check_unchanged
from macft.config.nearest import KNOWN_ELSEWHERE, TRACKERS_ELSEWHERE, schema_keys, unknown_key
from macft.config.overrides import override, quoted, unescaped
from macft.config.paths import config_folder
from macft.config.schema import TrainConfig, register_schema
from macft.config.sweeps import SweepPlan, no_sweep, plan_sweep
from macft.config.yaml import check_whole
from macft.data.files import READERS
from macft.device.user_folder import user_config_folder
from macft.errors import ConfigError
from macft.report.latest import followed
from macft.report.settings import TRACKERS
from macft.topology import topology_file

_FREE_FORM = ("dataset.columns", "optimizer.arguments")
"""Users add keys of their own below these, without Hydra's ``+``."""
_GROUPS_OF_FLAGS = ("model", "dataset", "optimizer", "seed")
_FOLDERS = ("resume", "hydra.run.dir", "hydra.sweep.dir")
_PATHS = (*_FOLDERS, "model", "model.path", "dataset", "dataset.path", "adapter.init_from", "topology.join")
"""Keys whose value may be a path: as a user's shell completes it, without the quotes of Hydra's grammar."""


@dataclass(frozen=True)
class OutputFolder:
    """Where the command's results go: ``path`` as the configuration has it.

    ``is_named`` tells a folder that was named from one with the time in its name.
    """

    key: str
    path: Path
    is_named: bool


@dataclass(frozen=True)
class CommandLine:
    """The arguments for Hydra, and what they mean.

    Attributes:
        argv: The arguments in Hydra's own form.
        resume: The run folder to resume, if any.
        job: The configuration, of a sweep that of the first job; None where the command only asks for information.
        sweep: What is known of a sweep, whose jobs have each a folder of its own below ``output``; None for one run.
        output: The folder for the results; None where none are made.
    """

    argv: list[str]
    resume: Path | None = None
    job: TrainConfig | None = None
    sweep: SweepPlan | None = None
    output: OutputFolder | None = None

    def with_output(self, folder: Path, *, is_new: bool) -> list[str]:
        """The arguments, with ``folder`` for the results. Hydra writes its own records only into a new folder."""
        assert self.output is not None
        more = [override(self.output.key, folder)]
        if not is_new:
            more.append("hydra.output_subdir=null")
        return [*self.argv, *more]


def prepare(argv: list[str]) -> CommandLine:
    """Expands macft's short forms, and composes and checks every job of the command without starting it.

    Raises:
        ConfigError: The command is wrong; there is one line for each problem, which names a key.
    """
    register_schema()
    arguments = _arguments(argv)
    flags = _without(argv, arguments.overrides)
    if arguments.help or arguments.hydra_help or arguments.info or arguments.shell_completion:
        return CommandLine(argv)
    if sum(map(bool, (arguments.cfg, arguments.multirun, arguments.run))) > 1:
        raise ConfigError("--cfg, --run and -m: give one of them; --cfg shows the configuration of one run")
    if arguments.resolve and not arguments.cfg:
        raise ConfigError("--resolve: needs --cfg")
    check_unchanged(arguments.overrides)
    parsed = _parse([_as_path(text, is_sweep=arguments.multirun) for text in arguments.overrides])
    is_sweep = arguments.multirun or any(_asks_for_sweep(item) for item in parsed)
    resume, others = _take_resume(parsed)
    if resume is not None and is_sweep:
        raise ConfigError("resume: one run at a time; leave -m out")
    if not is_sweep:
        no_sweep(parsed)

    primary, name = config_folder(), arguments.config_name or "train"
    searched = [user_config_folder()] if user_config_folder().is_dir() else []
    if resume is not None:
        primary, name, searched = resume, "config", [config_folder(), *searched]
    elif arguments.config_path:
        primary, searched = _folder_of("--config-path", arguments.config_path), [config_folder(), *searched]
    own = [_folder_of("--config-dir", arguments.config_dir)] if arguments.config_dir else []
    folders = [primary, *own, *searched]
    rest = [text for item in others for text in _expand(item, folders, resuming=resume is not None)]
    rest += _steps_or_epochs(others)
    _check_keys(_parse(rest), folders)
    if resume is not None:
        flags += ["--config-path", str(resume), "--config-name", "config"]
        rest = [override("hydra.run.dir", resume), "hydra/job_logging=stdout", *rest]
    elif arguments.config_path:
        flags += ["--config-path", str(primary)]
    if any(item.key_or_group == "hydra.searchpath" for item in others):
        searched = []
    search = [_search(searched)] if searched else []
    # hydra.main knows the flag --config-dir, compose doesn't.
    checked = [*rest, *([_search([*own, *searched])] if own or searched else [])]
    config, job, sweep = _check(primary, name, checked, is_sweep=is_sweep)
    output = _output(config, is_sweep=is_sweep)
    argv = [*flags, *search, *rest, *(sweep.more if sweep is not None else [])]
    return CommandLine(argv, resume, job, sweep, None if arguments.cfg is not None else output)


def _arguments(argv: list[str]) -> argparse.Namespace:
    """Hydra's flags and the overrides, in any order."""
    parser = get_args_parser()

    def error(message: str) -> NoReturn:
        raise ConfigError(f"{message}; `python -m macft.train --help` shows what there is")

    parser.error = error  # type: ignore[method-assign]
    _refuse_flags_of_others(argv)
    return parser.parse_intermixed_args(argv)


def _refuse_flags_of_others(argv: list[str]) -> None:
    """Translates the flags of mlx_lm.lora and of other trainers.

    Raises:
        ConfigError: there are some; one line for each, with the override that does the same.
    """
    lines = []
    for place, word in enumerate(argv):
        name, equals, value = word.removeprefix("--").partition("=")
        if word.startswith("--") and (tracker := TRACKERS_ELSEWHERE.get(name.replace("-", "_"))):
            value = value or next(iter(argv[place + 1 : place + 2]), "-")
            tracker = value if value in TRACKERS else tracker
            flag = word.partition("=")[0]
            lines.append(f"{flag}: overrides are written key=value: 'report.trackers=[{tracker}]'")
            continue
        key = KNOWN_ELSEWHERE.get(name.replace("-", "_")) or (name if name in _GROUPS_OF_FLAGS else None)
        if not word.startswith("--") or key is None:
            continue
        if not equals:
            value = next(iter(argv[place + 1 : place + 2]), "-")
        value = "VALUE" if value.startswith("-") else value
        lines.append(f"{word.partition('=')[0]}: overrides are written key=value: {key}={value}")
    if lines:
        raise ConfigError("\n".join(lines))


def _output(job: DictConfig, *, is_sweep: bool) -> OutputFolder:
    """The output folder of a composed job.

    Raises:
        ConfigError: its name can't be made, or jobs would run in it.
    """
    if job.hydra.job.chdir:
        raise ConfigError(
            "hydra.job.chdir: true is not supported; relative paths begin at the folder where the command is typed"
        )
    part, key = (job.hydra.sweep, "hydra.sweep.dir") if is_sweep else (job.hydra.run, "hydra.run.dir")
    pattern = str(OmegaConf.to_container(part, resolve=False)["dir"])  # type: ignore[index, call-overload]
    if not pattern:
        raise ConfigError(f"{key}: nothing is given; name a folder, or leave the override out")
    try:
        path = Path(str(part.dir)).expanduser()
    except OmegaConfBaseException as error:
        raise ConfigError(f"{key}: {' '.join(str(error).split())}") from error
    return OutputFolder(key, path, is_named="${now" not in pattern)


def _folder_of(flag: str, value: str) -> Path:
    folder = Path(value).expanduser().absolute()
    if not folder.is_dir():
        raise ConfigError(f"{flag}: {folder} is not a folder")
    return folder


def _search(folders: list[Path]) -> str:
    return "hydra.searchpath=[" + ",".join(quoted(f"file://{folder}", resolved=False) for folder in folders) + "]"


def _without(argv: list[str], overrides: list[str]) -> list[str]:
    left = list(argv)
    for text in overrides:
        left.remove(text)
    return left


def _as_path(text: str, *, is_sweep: bool) -> str:
    """The override ``text``, with quotes if its value is a path that Hydra's grammar would take for something else."""
    key, equals, value = text.partition("=")
    plain_key = key.lstrip("+")
    if not equals or plain_key not in _PATHS or not value:
        return text
    try:
        parsed = OverridesParser.create().parse_override(text)
        is_text = isinstance(parsed.value(), str) and not parsed.is_sweep_override()
        if is_text and parsed.value() == value and "${" not in value:
            return text
    except HydraException:
        if not (is_sweep and "," in value):
            return f"{key}={quoted(value)}"
        is_text = False
    is_path = _exists(Path(value).expanduser()) or (not is_text and plain_key in _FOLDERS)
    return f"{key}={quoted(value)}" if is_path else text


def _exists(path: Path) -> bool:
    """Whether ``path`` is there, or is to be made in a folder whose name looks like an interpolation."""
    return any(os.path.lexists(part) for part in (path, *path.parents) if part == path or "${" in str(part))


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
                f"{key.lstrip('+')}: the value {value!r} is not in Hydra's syntax; quote it: "
                f"{command(f'{key}={quoted(value)}')}"
            ) from error
    return parsed


def _asks_for_sweep(item: Override) -> bool:
    return item.key_or_group == "hydra.mode" and str(item.value()).upper() == "MULTIRUN"


def _take_resume(parsed: list[Override]) -> tuple[Path | None, list[Override]]:
    """Separates ``+resume=FOLDER`` (``resume=FOLDER`` is understood too) from the other overrides."""
    chosen = [item for item in parsed if item.key_or_group == "resume"]
    rest = [item for item in parsed if item.key_or_group != "resume"]
    if not chosen:
        return None, rest
    typed_folder = _texts(chosen[-1])[-1]
    if not typed_folder:
        raise ConfigError("resume: nothing is given; give a run's folder, such as runs/NAME/TIME or runs/latest")
    folder = followed(Path(typed_folder).expanduser().absolute())
    if not (folder / "config.yaml").is_file():
        what = "is not a run's folder (it has no config.yaml)" if folder.is_dir() else "does not exist"
        raise ConfigError(f"resume: {folder} {what}; give a run's folder, such as runs/NAME/TIME or runs/latest")
    try:
        check_whole(folder / "config.yaml")
    except ConfigError as error:
        raise ConfigError(f"resume: {error}") from error
    return folder, rest


def _expand(item: Override, folders: list[Path], *, resuming: bool) -> list[str]:
    """The override in Hydra's form; a short form may become several overrides."""
    text, group = str(item.input_line), item.key_or_group
    if group == "recipe" and not text.startswith(("+", "~")):
        return [f"+{text}"]
    if group in ("model", "dataset"):
        values = _texts(item)
        locations = [value for value in values if _is_location(value, group, folders)]
        if locations and len(locations) < len(values):
            (option, *_) = set(values) - set(locations)
            raise ConfigError(
                f"{group}: {option} is a name and {locations[0]} is not; sweep over names, or over ids and paths"
            )
        if locations:
            return [f"{'+' if resuming else ''}{group}=custom", f"{group}.path={','.join(map(quoted, values))}"]
    if _is_free_form(group) and not text.startswith(("+", "~")):
        return [f"++{text}"]
    # A resumed run's configuration has no defaults list, so the group is added to it.
    if resuming and "/" not in group and not text.startswith(("+", "~")) and _is_group(group, folders):
        return [f"+{text}"]
    return [text]


def _steps_or_epochs(typed: list[Override]) -> list[str]:
    """Sets to null what the recipe has of the two where only the other one was typed."""
    keys = {item.key_or_group: item for item in typed}
    for key, other in (("training.epochs", "training.steps"), ("training.steps", "training.epochs")):
        if key in keys and other not in keys and keys[key].value() is not None:
            return [f"{other}=null"]
    return []


def _texts(item: Override) -> list[str]:
    """The values of an override as texts, without quotes."""
    values = [item.value()]
    if item.is_sweep_override():
        if item.value_type not in (ValueType.CHOICE_SWEEP, ValueType.SIMPLE_CHOICE_SWEEP):
            return []
        parser = OverridesParser.create()
        values = [parser.parse_override(f"key={value}").value() for value in item.sweep_string_iterator()]
    try:
        return [unescaped(value) for value in values if value is not None]
    except OmegaConfBaseException as error:
        raise ConfigError(f"{item.key_or_group}: {' '.join(str(error).split())}") from error


def _is_location(value: str, group: str, folders: list[Path]) -> bool:
    """Whether ``model=VALUE`` or ``dataset=VALUE`` means a hub id or a path rather than an option of the group."""
    if any(os.path.isfile(folder / group / f"{value}.yaml") for folder in folders):  # noqa: PTH113 - see below
        return False
    if group == "dataset" and Path(value).suffix.lower() in READERS:
        return True
    # Unlike pathlib's, os.path's functions don't raise for a text that no path can be.
    return "/" in value or value.startswith(("~", ".", "builtin:")) or os.path.exists(value)  # noqa: PTH110


def _is_free_form(key: str) -> bool:
    return key.startswith(_FREE_FORM)


def _is_group(name: str, folders: list[Path]) -> bool:
    return any((folder / name).is_dir() for folder in folders)


def _check_keys(parsed: list[Override], folders: list[Path]) -> None:
    known = set(schema_keys(TrainConfig))
    for item in parsed:
        key = item.key_or_group
        is_hydra = key == "hydra" or key.startswith(("hydra.", "hydra/"))
        is_group = _is_group(key.split("@", 1)[0], folders)
        if is_group and not item.is_delete() and item.value() is None:
            raise ConfigError(f"{key}: null is none of its options; name one, or leave the override out")
        if is_hydra or is_group:
            continue
        if key not in known and not _is_free_form(key) and not key.startswith("dataset.sources"):
            raise ConfigError(unknown_key(key, TrainConfig))


def _check(
    primary: Path, name: str, overrides: list[str], *, is_sweep: bool
) -> tuple[DictConfig, TrainConfig, SweepPlan | None]:
    """Composes and checks the one job there is, or those of a sweep; what Hydra makes of the first, and the plan."""
    with hydra_at(primary):
        if is_sweep:
            plan = plan_sweep(name, overrides)
            return plan.first, typed(plan.first), plan
        config = compose(name, overrides=overrides, return_hydra_config=True)
        job = typed(config)
    chosen = config.hydra.runtime.choices.get("topology")
    if job.topology.kind == "single" != chosen and chosen in topology_file.names():
        raise ConfigError(f"{topology_file.path_of(chosen)}: {topology_file.NO_TOPOLOGY}")
    return config, job, None
