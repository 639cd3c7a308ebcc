"""Loads a model folder for training: frozen, in the type and quantisation that suit the device."""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path

from macft.device.mlx_device import on_cpu
from macft.errors import ConfigError, ModelError
from macft.model.settings import ModelConfig

_DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.*", "*.tiktoken", "tokenization_*.py")


@dataclass
class LoadedModel:
    """A frozen model and its tokenizer.

    ``config`` is the checkpoint's config.json, its ``quantization`` entry as the weights are now held.
    ``dtype`` is the type of the floating-point weights (of the scales, where weights are quantised).
    ``notes`` are lines for the user.
    """

    model: nn.Module
    # An mlx_lm.tokenizer_utils.TokenizerWrapper.
    tokenizer: Any
    path: Path
    config: dict[str, Any]
    was_quantized: bool
    is_quantized: bool
    dtype: mx.Dtype
    notes: list[str] = field(default_factory=list)


def load(config: ModelConfig, path: Path, tokenizer: Any = None) -> LoadedModel:
    """Loads the model and tokenizer in the folder ``path``, which :func:`~macft.model.resolve.resolve` found.

    ``tokenizer`` is one that :func:`load_tokenizer` loaded before, if any. On the CPU ``auto`` means float32 and
    dequantised: nothing else goes through BLAS. There, ``4bit`` and ``8bit``
    quantise and then hold those very values in float32: the arithmetic of QLoRA (Dettmers et al. 2023,
    arXiv:2305.14314) without its saving of memory. On a GPU ``auto`` changes nothing.

    Raises:
        ModelError: the folder can't be read as a model that mlx-lm knows, or has no tokenizer.
        ConfigError: the checkpoint is quantised to another width than ``config.quantization`` asks for.
    """
    from mlx_lm.utils import dequantize_model, load_model

    with _readable(path, "as a model"):
        model, settings = load_model(path, lazy=True, trust_remote_code=config.trust_remote_code)
    tokenizer = tokenizer or load_tokenizer(config, path)
    was_quantized, original = _is_quantized(model), _float_dtype(model)
    precision, quantization, cpu = config.precision, config.quantization, on_cpu()
    if precision == "auto":
        precision = "float32" if cpu else "checkpoint"
    if quantization == "auto":
        quantization = "none" if cpu else "keep"
    notes: list[str] = []

    if quantization in ("4bit", "8bit"):
        bits = int(quantization[0])
        if was_quantized:
            _check_same_width(settings, bits)
        else:
            model, settings = _quantize(model, settings, bits, config.quantization_group_size)
        if cpu:
            notes.append(f"{bits}-bit weights are held as float32: exact, and the only fast type on a CPU")
    if _is_quantized(model) and (quantization == "none" or (cpu and quantization != "keep")):
        # In float32, so that the scales lose nothing before the type that is asked for.
        _cast_scales(model)
        model = dequantize_model(model)
        settings = {k: v for k, v in settings.items() if k not in ("quantization", "quantization_config")}
        _cast(model, _DTYPES.get(precision, original))
    elif precision in _DTYPES:
        _cast(model, _DTYPES[precision])
    if cpu and _is_quantized(model):
        notes.append("quantised weights are about 20 times slower on a CPU than model.quantization=none")
    if cpu and _float_dtype(model) != mx.float32:
        notes.append("on a CPU every type but float32 is many times slower; model.precision=auto picks it")
    with _readable(path, "weights"):
        mx.eval(model.parameters())
    model.freeze()
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        path=path,
        config=settings,
        was_quantized=was_quantized,
        is_quantized=_is_quantized(model),
        dtype=_float_dtype(model),
        notes=notes,
    )


def load_tokenizer(config: ModelConfig, path: Path) -> Any:
    """The tokenizer in the folder ``path``, an mlx_lm TokenizerWrapper; no weights are read.

    Raises:
        ModelError: there is none, or it can't be read.
    """
    from mlx_lm.utils import load_config
    from mlx_lm.utils import load_tokenizer as load_wrapped

    if not any(any(path.glob(pattern)) for pattern in _TOKENIZER_FILES):
        raise ModelError(f"{path} has no tokenizer: neither tokenizer.json nor tokenizer.model")
    with _readable(path, "tokenizer"):
        return load_wrapped(
            path,
            {"trust_remote_code": config.trust_remote_code},
            eos_token_ids=load_config(path).get("eos_token_id"),
        )


@contextlib.contextmanager
def _readable(path: Path, what: str) -> Iterator[None]:
    """Turns whatever mlx-lm, MLX or transformers raise over a bad file into one line."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0].rstrip(":. ") if lines else type(error).__name__
        if isinstance(error, KeyError):
            reason = f"no {reason}"
        if "trust_remote_code" in str(error):
            reason = "it runs Python code of its own; read it, then set model.trust_remote_code=true"
        raise ModelError(f"{path} can't be read {what}: {reason}") from error


def _is_quantized(model: nn.Module) -> bool:
    return any("scales" in module for module in model.modules())


def _float_dtype(model: nn.Module) -> mx.Dtype:
    """The floating-point type that holds most of the model's values."""
    sizes: Counter[mx.Dtype] = Counter()
    for _, value in tree_flatten(model.parameters()):
        if mx.issubdtype(value.dtype, mx.floating):
            sizes[value.dtype] += value.size
    return sizes.most_common(1)[0][0]


def _check_same_width(settings: dict[str, Any], bits: int) -> None:
    held = settings.get("quantization", {}).get("bits")
    if held != bits:
        raise ConfigError(
            f"model.quantization: {bits}bit needs an unquantised checkpoint or one of {bits} bits, and this "
            f"one has {held or 'another kind of'} bits; use keep or none"
        )


def _quantize(
    model: nn.Module, settings: dict[str, Any], bits: int, group_size: int
) -> tuple[nn.Module, dict[str, Any]]:
    from mlx_lm.utils import quantize_model

    with contextlib.redirect_stdout(io.StringIO()):  # mlx-lm prints the bits per weight
        quantized, settings = quantize_model(model, settings, group_size, bits)
    return quantized, settings


def _cast_scales(model: nn.Module) -> None:
    for module in model.modules():
        for name in ("scales", "biases"):
            value = module.get(name)
            if value is not None and mx.issubdtype(value.dtype, mx.floating):
                module[name] = value.astype(mx.float32)


def _cast(model: nn.Module, dtype: mx.Dtype) -> None:
    """Casts the floating-point parameters except those the architecture wants left alone, as mlx-lm does."""
    allowed = getattr(model, "cast_predicate", lambda _: True)

    def cast(path: str, value: mx.array) -> mx.array:
        return value.astype(dtype) if allowed(path) and mx.issubdtype(value.dtype, mx.floating) else value

    model.update(tree_map_with_path(cast, model.parameters()))
