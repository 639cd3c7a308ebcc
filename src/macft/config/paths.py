"""Finds the YAML files: ``configs/`` in the installed package, or at the root of a checkout."""

from __future__ import annotations

from pathlib import Path

import macft


def config_folder() -> Path:
    """The folder with ``train.yaml`` and the config groups; its ``recipe`` entry is ``recipes/``."""
    package = Path(macft.__file__).parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parents[1] / "configs"
