"""Fuses an attached adapter into its base model, as ``mlx_lm.fuse`` does, and saves the result."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mlx.utils import tree_unflatten

from macft.errors import ModelError
from macft.model.adapters.files import save_model
from macft.model.load import LoadedModel
from macft.model.settings import ModelConfig


def as_checkpoint(config: ModelConfig) -> ModelConfig:
    """``config`` with the checkpoint's own precision and quantisation instead of this device's.

    A fused model is also used on other devices.
    """
    return replace(
        config,
        precision="checkpoint" if config.precision == "auto" else config.precision,
        quantization="keep" if config.quantization == "auto" else config.quantization,
    )


def fuse(loaded: LoadedModel, *, dequantize: bool) -> int:
    """Merges the adapter's layers into the weights they adapt, in place; returns the number of layers.

    Nothing is computed yet, so that a model which is read lazily needs no memory.

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
    return len(fused)


def save_fused(folder: Path, loaded: LoadedModel) -> None:
    """Writes the model in mlx-lm's and Hugging Face's format, file by file; its weights are gone afterwards.

    Raises:
        ModelError: It can't be written.
    """
    try:
        save_model(folder, loaded, donate=True)
    except OSError as error:
        raise ModelError(f"{folder} can't be written: {error.strerror or error}") from error
    except (ValueError, AssertionError, NotImplementedError, RuntimeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(f"mlx-lm can't write {folder}: {reason}") from error
