"""Fuses an attached adapter into its base model, as ``mlx_lm.fuse`` does, and saves the result."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from macft.errors import ConfigError, ModelError
from macft.model.adapter_files import save_model
from macft.model.load import LoadedModel
from macft.model.settings import ModelConfig

_GGUF_TYPES = ("llama", "mixtral", "mistral")


def as_checkpoint(config: ModelConfig) -> ModelConfig:
    """``config`` with the checkpoint's own precision and quantisation instead of this device's.

    A fused model is also used on other devices.
    """
    return replace(
        config,
        precision="checkpoint" if config.precision == "auto" else config.precision,
        quantization="keep" if config.quantization == "auto" else config.quantization,
    )


def check_gguf(folder: Path, *, dequantize: bool) -> None:
    """Checks that mlx-lm can export the model in ``folder`` as GGUF.

    Raises:
        ConfigError: It can't.
        ModelError: The model's config.json can't be read.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder / 'config.json'} can't be read: {error}") from error
    if config.get("model_type") not in _GGUF_TYPES:
        raise ConfigError(
            f"--export-gguf: mlx-lm exports {', '.join(_GGUF_TYPES)}, and this is {config.get('model_type')}; "
            "convert the fused folder with llama.cpp's convert_hf_to_gguf.py"
        )
    if "quantization" in config and not dequantize:
        raise ConfigError(
            "--export-gguf: mlx-lm can't export quantised weights, which this base model has; add --dequantize"
        )


def fuse(loaded: LoadedModel, *, dequantize: bool) -> int:
    """Merges the adapter's layers into the weights they adapt, in place; returns the number of layers.

    The merged weights of a quantised base are quantised again. With ``dequantize`` the whole model is dequantised.
    """
    from mlx_lm.utils import dequantize_model

    fused = [
        (name, module.fuse(dequantize=dequantize))
        for name, module in loaded.model.named_modules()
        if hasattr(module, "fuse")
    ]
    if fused:
        loaded.model.update_modules(tree_unflatten(fused))
    if dequantize and loaded.is_quantized:
        loaded.model = dequantize_model(loaded.model)
        loaded.config = {k: v for k, v in loaded.config.items() if k not in ("quantization", "quantization_config")}
        loaded.is_quantized = False
    mx.eval(loaded.model.parameters())
    return len(fused)


def save_fused(folder: Path, loaded: LoadedModel, *, gguf_name: str | None) -> None:
    """Writes the model in mlx-lm's and Hugging Face's format, and with ``gguf_name`` also as GGUF in the same folder.

    Raises:
        ModelError: It can't be written, or mlx-lm can't export it.
    """
    try:
        save_model(folder, loaded)
        if gguf_name is not None:
            from mlx_lm.gguf import convert_to_gguf

            weights = dict(tree_flatten(loaded.model.parameters()))
            with contextlib.redirect_stdout(io.StringIO()):  # mlx-lm prints its progress
                convert_to_gguf(folder, weights, loaded.config, str(folder / gguf_name))
    except OSError as error:
        raise ModelError(f"{folder} can't be written: {error.strerror or error}") from error
    except (ValueError, AssertionError, NotImplementedError, RuntimeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(f"mlx-lm can't write {folder}: {reason}") from error
