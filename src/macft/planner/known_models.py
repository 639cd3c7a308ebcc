"""The sizes of a model that a configuration names, which need not be on this machine."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from macft.config.schema import TrainConfig
from macft.model.fetch.bundled import BUNDLED, ensure_bundled
from macft.model.fetch.resolve import fetch_config, is_hub_id
from macft.model.shape import ModelShape, read_shape, shape_of


def find_shape(config: TrainConfig, notes: list[str]) -> tuple[ModelShape, Path | None]:
    """The model's shape, and its folder where that is on this machine; otherwise config.json alone is fetched."""
    name = config.model.path
    folder = Path(name).expanduser()
    if name in BUNDLED:
        folder = ensure_bundled(BUNDLED[name])
    if folder.is_dir():
        return read_shape(folder), folder
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(name, "config.json", revision=config.model.revision) if is_hub_id(name) else None
    if isinstance(cached, str):
        return read_shape(Path(cached).parent), Path(cached).parent
    if (known := known_models().get(name)) is not None:
        notes.append(f"{name}: sizes from macft's own table, the model is not on this machine")
        return shape_of(known, name), None
    fetched = fetch_config(config.model)
    return read_shape(fetched), fetched


def known_models() -> dict[str, dict[str, Any]]:
    """config.json of the models in models.yaml, by the path a run names them with."""
    text = files("macft.planner").joinpath("models.yaml").read_text(encoding="utf-8")
    return {row.pop("path"): row for row in yaml.safe_load(text)}
