"""The tuned model that a command names: a run's folder, or a model and an adapter, as for ``mlx_lm.generate``."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

from macft.cli.shell import command
from macft.config.overrides import resume_command
from macft.config.schema import TrainConfig
from macft.config.yaml import read
from macft.errors import ConfigError, ModelError
from macft.model.settings import ModelConfig
from macft.report.latest import followed
from macft.report.run_folder import RunFolder
from macft.topology.settings import PLACEMENTS, TopologyConfig, parse_budget

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from macft.model.execution import Execution
    from macft.model.load import LoadedModel


@dataclass(frozen=True)
class TunedModel:
    """A base model and its tuning.

    ``adapter`` is a folder in mlx-lm's format; ``whole`` is the folder of a fully tuned model; both may be None.
    ``run`` is the configuration of the run that made them, if it is known.
    """

    model: ModelConfig
    adapter: Path | None
    whole: Path | None
    run: TrainConfig | None
    # ``topology.placement``, as asked for on the command line; None: as in the run.
    placement: str | None = None

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> Self:
        """The model that ``arguments``, those of :func:`add_model_arguments`, name; see :meth:`find`."""
        return cls.find(
            arguments.run_folder,
            base_model=arguments.model,
            adapter_path=arguments.adapter_path,
            placement=arguments.placement,
            trust_remote_code=arguments.trust_remote_code,
        )

    @classmethod
    def find(
        cls,
        run_folder: Path | None,
        *,
        base_model: str | None = None,
        adapter_path: Path | None = None,
        placement: str | None = None,
        trust_remote_code: bool = False,
    ) -> Self:
        """The model of a run, or a base model with an adapter, or either; reads small files only.

        Raises:
            ConfigError: No model is named, or it isn't there.
            ModelError: The adapter's folder doesn't hold an adapter.
        """
        model = ModelConfig()
        adapter, whole = adapter_path, None
        run: TrainConfig | None = None
        if run_folder is not None:
            folder = find_run(run_folder)
            run = read(folder.config)
            model = run.model
            if adapter is None and folder.model.is_dir():
                whole = folder.model
            elif adapter is None:
                adapter = finished_adapter(folder)
        elif base_model is None and adapter is None:
            raise ConfigError("RUN_FOLDER: name a run's folder, or a model by --model and an adapter by --adapter-path")
        if adapter is not None:
            from macft.model.adapters.attach import read_adapter_config

            base = read_adapter_config(adapter).get("model")
            if run is None and base_model is None:
                if not base:
                    raise ConfigError(f"--model: {adapter} doesn't name its base model; name it here")
                model = replace(model, path=str(base))
        if base_model is not None:
            model = replace(model, path=base_model, revision=None)
        trust = model.trust_remote_code or trust_remote_code
        return cls(replace(model, trust_remote_code=trust), adapter, whole, run, placement)

    @property
    def name(self) -> str:
        """The run's name, or the last part of the model's."""
        return self.run.name if self.run is not None else Path(self.model.path).name

    def load(
        self, *, tuned: bool = True, tokenizer: TokenizerWrapper | None = None, is_lazy: bool = False
    ) -> LoadedModel:
        """Loads the model, as training would on this device; ``tuned=False`` leaves the tuning out.

        ``tokenizer`` is the base model's, if it was loaded before. Blocks that don't fit this machine are read when
        they are needed. With ``is_lazy`` each weight is, once, as :func:`~macft.model.load.load` does it.

        Raises:
            MacftError: the model can't be found or read, or the adapter doesn't fit it.
        """
        from macft.config.execution import inference_execution
        from macft.model.adapters.attach import attach
        from macft.model.fetch.resolve import resolve
        from macft.model.load import load, load_tokenizer

        if tuned and self.whole is not None:
            model, folder = replace(self.model, path=str(self.whole)), self.whole
        else:
            model, folder = self.model, resolve(self.model)
        micro_batch_size = self.run.training.micro_batch_size if self.run else None
        execution = inference_execution(model, folder, micro_batch_size=micro_batch_size)
        tokenizer = tokenizer or load_tokenizer(model, folder)  # before what is left for the model is looked up
        if not is_lazy:
            execution = self._placed(execution, folder)
        loaded = load(model, folder, execution, tokenizer, is_lazy=is_lazy)
        if tuned and self.adapter is not None:
            attach(loaded.model, self.adapter)
        loaded.model.eval()
        return loaded

    def _placed(self, execution: Execution, folder: Path) -> Execution:
        """``execution`` with the blocks in memory that this machine has room for."""
        from macft.device import heap
        from macft.device.memory import usable_bytes
        from macft.model.shape import read_shape
        from macft.planner.inference import inference_placement

        topology = self.run.topology if self.run else TopologyConfig()
        try:
            shape = read_shape(folder)
        except ModelError:
            shape = None
        budget = parse_budget(topology.memory_budget, usable_bytes())
        wanted = self.placement or topology.placement
        wanted = "auto" if wanted == "pipeline" else wanted  # this machine is alone
        resident = topology.resident_blocks if wanted == topology.placement else "auto"
        placed = inference_placement(execution, shape, budget, wanted, resident)
        if placed.placement == "stream":
            heap.return_large_arrays()
        return placed


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that name a tuned model."""
    parser.add_argument("run_folder", nargs="?", type=Path, help="a run's folder: its model and its adapter are used")
    parser.add_argument("--model", help="the base model: a bundled name, a Hugging Face id or a folder")
    parser.add_argument("--adapter-path", type=Path, help="an adapter's folder, in mlx-lm's format")
    parser.add_argument(
        "--placement",
        type=_placement,
        choices=[placement for placement in PLACEMENTS if placement != "pipeline"],
        help="stream: read blocks from disk when they are needed; default: as the run's topology.placement",
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the model")


def _placement(text: str) -> str:
    if text == "pipeline":
        raise argparse.ArgumentTypeError(
            "pipeline spreads a model over machines; generate, evaluate and serve do that with --topology"
        )
    return text


def find_run(path: Path) -> RunFolder:
    """The run in ``path``.

    Raises:
        ConfigError: ``path`` is not a run's folder.
    """
    folder = RunFolder(followed(path.expanduser()))
    if not folder.config.is_file():
        if (path / "adapter_config.json").is_file():
            raise ConfigError(
                f"RUN_FOLDER: {path} is an adapter's folder; name it by {command('--adapter-path', path)}"
            )
        what = "is not a run's folder (it has no config.yaml)" if folder.path.is_dir() else "does not exist"
        raise ConfigError(f"RUN_FOLDER: {path} {what}; give a run's folder, such as runs/NAME/TIME or runs/latest")
    return folder


def finished_adapter(folder: RunFolder) -> Path:
    """The folder with the adapter of a finished run.

    Raises:
        ConfigError: The run has no adapter yet.
    """
    if not (folder.adapters / "adapters.safetensors").is_file():
        raise ConfigError(
            f"RUN_FOLDER: {folder.path} has no adapter yet; it is written when the run ends "
            f"({resume_command(folder.path)})"
        )
    return folder.adapters
