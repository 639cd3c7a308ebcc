"""Finds the YAML files: ``configs/`` in the installed package, or at the root of a checkout."""

from __future__ import annotations

from pathlib import Path

import macft


def config_folder() -> Path:
    """The folder with ``train.yaml`` and the config groups; its ``recipe`` entry is ``recipes/``."""
    package = Path(macft.__file__).parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parents[1] / "configs"


def models_by_name() -> dict[str, str]:
    """The options of ``model=`` that name a model: {option: its path, as in ``model.path``}."""
    import yaml  # a tab key, which needs the folder, does not wait for it

    files = sorted((config_folder() / "model").glob("*.yaml"))
    paths = {file.stem: yaml.safe_load(file.read_text(encoding="utf-8")).get("path") for file in files}
    return {name: path for name, path in paths.items() if path}
