"""Adds an adapter in mlx-lm's format to a loaded model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from macft.cli.shell import command
from macft.errors import ModelError
from macft.model.adapters.files import check_finite, read_tensors
from macft.model.adapters.settings import KINDS
from macft.model.mlx_lm_tuner import linear_to_lora_layers, load_adapters


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The ``adapter_config.json`` of an mlx-lm adapter.

    Raises:
        ModelError: The folder is not an mlx-lm adapter, or the file can't be read.
    """
    file = folder / "adapter_config.json"
    if not file.is_file():
        raise ModelError(f"{folder} is not an adapter in mlx-lm's format: it has no {file.name}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{file} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{file} must hold a JSON object")
    if "peft_type" in config:
        raise ModelError(
            f"{folder} is in PEFT's format; convert it first: "
            f"{command('python', '-m', 'macft.adapter', 'import', folder)} --save-path ..."
        )
    if not (folder / "adapters.safetensors").is_file():
        raise ModelError(f"{folder} is not an adapter in mlx-lm's format: it has no adapters.safetensors")
    kind = config.get("fine_tune_type", "lora")
    if kind not in KINDS:
        raise ModelError(f"{file}: fine_tune_type must be one of {', '.join(KINDS)}, not {kind!r}")
    if kind != "full":
        parameters = config.get("lora_parameters")
        values = {"num_layers": config.get("num_layers")}
        for name in ("rank", "scale"):
            values[f"lora_parameters.{name}"] = parameters.get(name) if isinstance(parameters, dict) else None
        for name, value in values.items():
            if not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ModelError(f"{file}: {name} must be a number, as mlx_lm.lora writes it, not {value!r}")
    return config


def attach(model: nn.Module, folder: Path) -> None:
    """Adds the adapter in ``folder`` to ``model`` in place, with mlx-lm's own layers, for inference.

    Raises:
        ModelError: The adapter can't be read or doesn't fit this model.
    """
    config = read_adapter_config(folder)
    tensors = read_tensors(folder / "adapters.safetensors")
    if config.get("fine_tune_type", "lora") != "full":  # which may be many gigabytes
        check_finite(folder, tensors)
    try:
        if config.get("fine_tune_type", "lora") == "full":
            load_adapters(model, str(folder))
        elif missing := _add_layers(model, config, tensors):
            raise ModelError(f"adapter {folder} lacks {len(missing)} tensors that its config names, {missing[0]} first")
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        # The first line of mlx-lm's message only introduces the tensors that don't fit.
        reason = lines[min(1, len(lines) - 1)] if lines else type(error).__name__
        raise ModelError(f"adapter {folder} doesn't fit this model: {reason}") from error
    mx.eval(model.trainable_parameters())  # the adapter's, or all; a model that is read lazily stays so
    model.freeze()
    model.eval()


def _add_layers(model: nn.Module, config: dict[str, Any], tensors: dict[str, mx.array]) -> list[str]:
    """Adds the layers of ``config`` with the values in ``tensors``; returns the names of parameters without a value.

    As mlx-lm's ``load_adapters``, which does not know layers that keep several adapters in a list.

    Raises:
        ValueError: A tensor belongs to none of the layers.
    """
    model.freeze()
    is_dora = config.get("fine_tune_type") == "dora"
    linear_to_lora_layers(model, config["num_layers"], config["lora_parameters"], use_dora=is_dora)
    shapes = {name: value.shape for name, value in tree_flatten(model.trainable_parameters())}
    for name, value in tensors.items():
        if name not in shapes:
            raise ValueError(f"{name}: not an adapter parameter in the model")
        if value.shape != shapes[name]:
            raise ValueError(f"{name}: its shape {value.shape} does not match the model's {shapes[name]}")
    model.load_weights(list(tensors.items()), strict=False)
    return sorted(shapes.keys() - tensors.keys())
