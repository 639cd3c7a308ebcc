"""Paths of a configuration, so that a run goes on, and is evaluated, from any working folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from macft.config.schema import TrainConfig
from macft.data.settings import DatasetConfig
from macft.model.fetch.bundled import BUNDLED


def with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """``config`` with an absolute path wherever a relative one leads to something in the working folder.

    Names stay as they are: of bundled models and datasets, and ids of the Hub. So does what begins with ``~``, and all
    of ``topology=ssh``, whose paths begin at ``topology.folder`` of each host, wherever the command was typed.
    """
    return config if config.topology.kind == "ssh" else _absolute(config)


def with_paths_of_terminal(config: TrainConfig) -> TrainConfig:
    """``config`` of ``topology=ssh`` for the machine at whose terminal it was typed: with absolute paths.

    ``topology.paths`` has, for each of them, what the hosts find it by.
    """
    here = _absolute(config)
    typed = [path or "." for path in _paths(config)]  # no metric folder: the working folder
    moved = {path: text for path, text in zip(_paths(here), typed, strict=True) if path and path != text}
    return replace(here, topology=replace(here.topology, paths=config.topology.paths | moved))


def with_paths_of_hosts(config: TrainConfig) -> TrainConfig:
    """``config`` for the hosts of ``topology=ssh``: the inverse of :func:`with_paths_of_terminal`."""
    paths = config.topology.paths
    there = _with_paths(config, lambda path: paths.get(path, path))
    return replace(there, topology=replace(there.topology, paths={}))


def _absolute(config: TrainConfig) -> TrainConfig:
    dataset = replace(config.dataset, metric_folder=_metric_folder(config.dataset))
    return _with_paths(replace(config, dataset=dataset), _absolute_path)


def _paths(config: TrainConfig) -> list[str | None]:
    """All that :func:`_with_paths` may change."""
    dataset = config.dataset
    sources = [source.path for source in dataset.sources]
    return [config.model.path, dataset.path, *sources, config.adapter.init_from, dataset.metric_folder]


def _with_paths(config: TrainConfig, change: Callable[[str], str]) -> TrainConfig:
    """``config`` with ``change(path)`` for each path that is set. A bundled model has a name, and no path."""
    model, dataset, adapter = config.model, config.dataset, config.adapter
    return replace(
        config,
        model=model if model.path in BUNDLED else replace(model, path=change(model.path)),
        dataset=replace(
            dataset,
            path=change(dataset.path),
            metric_folder=None if dataset.metric_folder is None else change(dataset.metric_folder),
            sources=[replace(source, path=change(source.path)) for source in dataset.sources],
        ),
        adapter=adapter if adapter.init_from is None else replace(adapter, init_from=change(adapter.init_from)),
    )


def _absolute_path(path: str) -> str:
    if not path or path.startswith(("builtin:", "~")):
        return path
    return str(Path(path).absolute()) if Path(path).exists() else path


def _metric_folder(dataset: DatasetConfig) -> str | None:
    """The folder of the user's own metrics, if they have any and their module is not an installed one."""
    folder = Path(dataset.metric_folder or ".").expanduser().absolute()
    modules = [name.split(".")[0] for name in dataset.metrics() if "." in name]
    is_here = any((folder / name).is_dir() or (folder / f"{name}.py").is_file() for name in modules)
    return str(folder) if is_here else dataset.metric_folder
