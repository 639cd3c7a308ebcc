"""Paths of a configuration, so that a run goes on, and is evaluated, from any working folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from macft.config.schema import TrainConfig
from macft.data.settings import DatasetConfig
from macft.model.bundled import BUNDLED


def with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """``config`` with an absolute path wherever a relative one leads to something in the working folder.

    Names stay as they are: of bundled models and datasets, and ids of the Hub. So does what begins with ``~``, and all
    of ``topology=ssh``, whose paths begin at ``topology.folder`` of each host, wherever the command was typed.
    """
    if config.topology.kind == "ssh":
        return config
    model, dataset, adapter = config.model, config.dataset, config.adapter
    return replace(
        config,
        model=model if model.path in BUNDLED else replace(model, path=_absolute(model.path)),
        dataset=replace(
            dataset,
            path=_absolute(dataset.path),
            metric_folder=_metric_folder(dataset),
            sources=[replace(source, path=_absolute(source.path)) for source in dataset.sources],
        ),
        adapter=adapter if adapter.init_from is None else replace(adapter, init_from=_absolute(adapter.init_from)),
    )


def _absolute(path: str) -> str:
    if not path or path.startswith(("builtin:", "~")):
        return path
    return str(Path(path).absolute()) if Path(path).exists() else path


def _metric_folder(dataset: DatasetConfig) -> str | None:
    """The folder of the user's own metrics, if they have any and their module is not an installed one."""
    folder = Path(dataset.metric_folder or ".").expanduser().absolute()
    modules = [name.split(".")[0] for name in dataset.metrics() if "." in name]
    is_here = any((folder / name).is_dir() or (folder / f"{name}.py").is_file() for name in modules)
    return str(folder) if is_here else dataset.metric_folder
