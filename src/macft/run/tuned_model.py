"""The tuned model a command names: a run's folder, or a model and an adapter, as ``mlx_lm.generate`` takes them."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from macft.config.schema import TrainConfig
from macft.config.yaml import read
from macft.errors import ConfigError, MacftError
from macft.model.settings import ModelConfig
from macft.report.run_folder import RunFolder

if TYPE_CHECKING:
    from macft.model.load import LoadedModel


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is one line, as everywhere in macft."""

    def error(self, message: str) -> NoReturn:
        """Raises ConfigError instead of printing the usage."""
        raise ConfigError(f"{message}; see {self.prog} --help")


@dataclass(frozen=True)
class TunedModel:
    """``adapter`` is a folder in mlx-lm's format, ``whole`` that of a tuned model saved whole; both may be None.

    ``run`` is the configuration of the run they come from, if they do.
    """

    model: ModelConfig
    adapter: Path | None
    whole: Path | None
    run: TrainConfig | None

    def load(self, *, tuned: bool = True) -> LoadedModel:
        """Loads the model, as training would on this device; ``tuned=False`` leaves the tuning out.

        Raises:
            MacftError: the model can't be found or read, or the adapter doesn't fit it.
        """
        from macft.config.execution import inference_execution
        from macft.model.attach import attach
        from macft.model.load import load
        from macft.model.resolve import resolve

        if tuned and self.whole is not None:
            model, folder = replace(self.model, path=str(self.whole)), self.whole
        else:
            model, folder = self.model, resolve(self.model)
        micro_batch_size = self.run.training.micro_batch_size if self.run else None
        loaded = load(model, folder, inference_execution(model, folder, micro_batch_size=micro_batch_size))
        if tuned and self.adapter is not None:
            attach(loaded.model, self.adapter)
        loaded.model.eval()
        return loaded


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that name a tuned model."""
    parser.add_argument("run_folder", nargs="?", type=Path, help="a run's folder: its model and its adapter are taken")
    parser.add_argument("--model", help="the base model: a bundled name, a Hugging Face id or a folder")
    parser.add_argument("--adapter-path", type=Path, help="an adapter's folder, in mlx-lm's format")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the model")


def named(arguments: argparse.Namespace) -> TunedModel:
    """What ``arguments`` name; reads small files only.

    Raises:
        ConfigError: nothing is named, or it isn't there.
        ModelError: the adapter's folder is none.
    """
    model = ModelConfig()
    adapter: Path | None = arguments.adapter_path
    whole: Path | None = None
    run: TrainConfig | None = None
    if arguments.run_folder is not None:
        folder = run_folder(arguments.run_folder)
        run = read(folder.config)
        model = run.model
        if adapter is None and folder.model.is_dir():
            whole = folder.model
        elif adapter is None:
            adapter = finished_adapter(folder)
    elif arguments.model is None and adapter is None:
        raise ConfigError("RUN_FOLDER: name a run's folder, or a model by --model and an adapter by --adapter-path")
    if adapter is not None:
        from macft.model.attach import read_adapter_config

        base = read_adapter_config(adapter).get("model")
        if run is None and arguments.model is None:
            if not base:
                raise ConfigError(f"--model: {adapter} doesn't say what its base model is; name it")
            model = replace(model, path=str(base))
    if arguments.model is not None:
        model = replace(model, path=arguments.model, revision=None)
    return TunedModel(
        replace(model, trust_remote_code=model.trust_remote_code or arguments.trust_remote_code), adapter, whole, run
    )


def run_folder(path: Path) -> RunFolder:
    """The run in ``path``; raises ConfigError if there is none."""
    folder = RunFolder(path.expanduser())
    if not folder.config.is_file():
        if (path / "adapter_config.json").is_file():
            raise ConfigError(f"RUN_FOLDER: {path} is an adapter's folder; name it by --adapter-path {path}")
        what = "is not a run's folder (it has no config.yaml)" if folder.path.is_dir() else "does not exist"
        raise ConfigError(f"RUN_FOLDER: {path} {what}; give the folder that a run printed as its own, runs/NAME/TIME")
    return folder


def finished_adapter(folder: RunFolder) -> Path:
    """The adapter of a run that has ended; raises ConfigError if there is none yet."""
    if not (folder.adapters / "adapters.safetensors").is_file():
        raise ConfigError(
            f"RUN_FOLDER: {folder.path} has no adapter yet; it is written when the run ends "
            f"(python -m macft.train +resume={folder.path})"
        )
    return folder.adapters


def command(main: Callable[[Sequence[str]], None], argv: Sequence[str]) -> int:
    """Calls ``main(argv)``; an error becomes one line on standard error. Returns the exit status."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        main(argv)
    except MacftError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0
