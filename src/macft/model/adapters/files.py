"""Reads and writes adapters in mlx-lm's format: ``adapters.safetensors`` and ``adapter_config.json``."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.utils import save

from macft.device.durable import write_atomically
from macft.errors import ModelError
from macft.model.files.plain_path import plain_path
from macft.model.load import LoadedModel


def save_adapter(folder: Path, model: nn.Module, settings: Mapping[str, Any], *, model_name: str) -> None:
    """Writes ``model``'s trainable parameters so that ``mlx_lm.generate --adapter-path`` and ``mlx_lm.fuse`` read them.

    ``settings`` are :attr:`Adaptation.mlx_lm_config`. Each file is replaced atomically, the weights last.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = {**settings, "model": model_name}
    write_atomically(folder / "adapter_config.json", json.dumps(config, indent=4) + "\n")
    weights = io.BytesIO()
    mx.save_safetensors(weights, dict(tree_flatten(model.trainable_parameters())))
    # Unlike MLX's own writing, this raises an error when the disk is full.
    write_atomically(folder / "adapters.safetensors", weights.getbuffer())


def save_model(folder: Path, loaded: LoadedModel, *, donate: bool = False) -> None:
    """Writes the whole model in mlx-lm's format; with ``donate`` the weights are given up as they are written."""
    with plain_path(loaded.path) as plain:
        save(folder, plain, loaded.model, loaded.tokenizer, dict(loaded.config), donate_model=donate)


def load_adapter_weights(path: Path, model: nn.Module) -> None:
    """Loads ``adapters.safetensors`` at ``path`` (the file, its folder or that of a run) into an adapted ``model``.

    Raises:
        ModelError: The file is missing, its tensors don't fit the adapter, or a value is not finite.
    """
    in_folders = [path / "adapters.safetensors", path / "adapters" / "adapters.safetensors"]
    file = next((found for found in [path, *in_folders] if found.is_file()), None)
    if file is None:
        raise ModelError(f"no adapter at {path}: expected a run's folder, an adapter folder or adapters.safetensors")
    weights = read_tensors(file)
    expected = {name: value.shape for name, value in tree_flatten(model.trainable_parameters())}
    if difference := _difference({name: value.shape for name, value in weights.items()}, expected):
        raise ModelError(
            f"adapter {file} doesn't fit: {difference}; "
            "adapter.type, rank, layers and targets must be those it was trained with"
        )
    check_finite(file, weights)
    model.load_weights(list(weights.items()), strict=False)
    mx.eval(model.parameters())


def check_finite(path: Path, tensors: Mapping[str, mx.array]) -> None:
    """Raises ModelError if a value in ``tensors``, read from ``path``, is infinite or NaN."""
    finite = {name: mx.isfinite(value).all() for name, value in tensors.items()}
    mx.eval(finite)
    if wrong := sorted(name for name, is_finite in finite.items() if not is_finite):
        raise ModelError(
            f"adapter {path}: {wrong[0]} has values that are not finite; its training diverged, or it is damaged"
        )


def _difference(shapes: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> str:
    """The first difference; empty where there is none."""
    if extra := sorted(shapes.keys() - expected.keys()):
        return f"it holds {extra[0]}, which isn't trained here"
    if missing := sorted(expected.keys() - shapes.keys()):
        return f"it lacks {missing[0]}"
    wrong = (name for name in sorted(expected) if shapes[name] != expected[name])
    return next((f"{name} is {shapes[name]}, not {expected[name]}" for name in wrong), "")


def read_tensors(file: Path) -> dict[str, mx.array]:
    """The tensors of a safetensors file, by name.

    Raises:
        ModelError: The file can't be read.
    """
    try:
        tensors = mx.load(str(file), format="safetensors")
    except (RuntimeError, ValueError) as error:
        raise ModelError(f"adapter {file} can't be read: {' '.join(str(error).split())}") from error
    assert isinstance(tensors, dict)
    return tensors
