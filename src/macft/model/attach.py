"""Adds an adapter in mlx-lm's format to a loaded model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import load_adapters

from macft.errors import ModelError
from macft.model.adapter_files import read_tensors

_ADAPTER_PARAMETERS = ("lora_a", "lora_b", "m")


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
            f"{folder} is in PEFT's format; convert it first: python -m macft.adapter import {folder} --save-path ..."
        )
    if not (folder / "adapters.safetensors").is_file():
        raise ModelError(f"{folder} is not an adapter in mlx-lm's format: it has no adapters.safetensors")
    return config


def attach(model: nn.Module, folder: Path) -> None:
    """Adds the adapter in ``folder`` to ``model`` in place, with mlx-lm's own layers, for inference.

    Raises:
        ModelError: The adapter can't be read or doesn't fit this model.
    """
    kind = read_adapter_config(folder).get("fine_tune_type", "lora")
    tensors = read_tensors(folder / "adapters.safetensors")
    try:
        load_adapters(model, str(folder))
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        # The first line of mlx-lm's message only introduces the tensors that don't fit.
        reason = lines[min(1, len(lines) - 1)] if lines else type(error).__name__
        raise ModelError(f"adapter {folder} doesn't fit this model: {reason}") from error
    if kind != "full":
        names = {name for name, _ in tree_flatten(model.parameters()) if name.rsplit(".", 1)[-1] in _ADAPTER_PARAMETERS}
        if missing := sorted(names - tensors.keys()):
            raise ModelError(f"adapter {folder} lacks {len(missing)} tensors that its config names, {missing[0]} first")
    model.freeze()
    model.eval()
    mx.eval(model.parameters())
