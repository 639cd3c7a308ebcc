"""Loads a model folder for training: frozen, in the type and quantisation that suit the device."""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path

from macft.device.kind import Device
from macft.errors import ModelError
from macft.model.blocks.block_weights import BlockWeights
from macft.model.execution import Execution, WeightFormat
from macft.model.execution import resolve as resolve_execution
from macft.model.files.plain_path import plain_path
from macft.model.settings import ModelConfig
from macft.model.shape import read_weight_format

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

_DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.*", "*.tiktoken", "tokenization_*.py")


@dataclass
class LoadedModel:
    """A frozen model and its tokenizer.

    ``config`` is the checkpoint's config.json, its ``quantization`` entry as the weights are now held.
    ``dtype`` is the type of the floating-point weights (of the scales, where weights are quantised).
    ``execution`` is the record it was loaded by. ``notes`` are lines for the user.
    """

    model: nn.Module
    tokenizer: TokenizerWrapper
    path: Path
    config: dict[str, Any]
    was_quantized: bool
    is_quantized: bool
    dtype: mx.Dtype
    execution: Execution
    notes: list[str] = field(default_factory=list)
    # Where blocks are read from disk when they are needed; None: all weights are in memory.
    streamed: BlockWeights | None = None


def load(
    config: ModelConfig,
    path: Path,
    execution: Execution | None = None,
    tokenizer: TokenizerWrapper | None = None,
    *,
    is_lazy: bool = False,
) -> LoadedModel:
    """Loads the model and tokenizer in the folder ``path``, as :func:`~macft.model.fetch.resolve.resolve` returns it.

    ``execution`` says in which type and quantisation; None: as this device computes it outside of training.
    ``tokenizer`` is one that :func:`load_tokenizer` loaded before, if any. With ``is_lazy`` each weight is read when it
    is first used, for those who use them one after the other.

    Raises:
        ModelError: the folder can't be read as a model that mlx-lm knows, or has no tokenizer.
        ConfigError: the checkpoint is quantised to another width than ``config.quantization`` asks for.
    """
    execution = execution or resolve_execution(config, read_weight_format(path), Device.default())
    model, settings, was_quantized = _unread(config, path, execution)
    tokenizer = tokenizer or load_tokenizer(config, path)
    streamed = None
    with _readable(path, "weights"):
        if execution.supplies_blocks:
            streamed = _block_weights(model, config, path, execution)
        elif not is_lazy:
            mx.eval(model.parameters())
    with _readable(path, "a model"):
        model.freeze()
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        path=path,
        config=settings,
        was_quantized=was_quantized,
        is_quantized=_is_quantized(model),
        dtype=_float_dtype(model),
        execution=execution,
        notes=_notes(execution),
        streamed=streamed,
    )


def load_without_blocks(config: ModelConfig, path: Path, execution: Execution) -> tuple[nn.Module, BlockWeights]:
    """The model in the folder ``path`` without its blocks' weights, and what supplies them; raises as :func:`load`."""
    model, _, _ = _unread(config, path, execution)
    with _readable(path, "weights"):
        return model, _block_weights(model, config, path, execution)


def _block_weights(model: nn.Module, config: ModelConfig, path: Path, execution: Execution) -> BlockWeights:
    renewal = _Renewal(config, path, execution)
    return BlockWeights(
        model, renewal, resident=execution.resident_blocks, source=str(path), reads_ends=execution.reads_ends
    )


def _unread(
    config: ModelConfig, path: Path, execution: Execution, skeleton: nn.Module | None = None
) -> tuple[nn.Module, dict[str, Any], bool]:
    """The model in its final form, of arrays that aren't read or computed yet; its settings; whether it was quantised.

    ``skeleton`` is a model that an earlier call returned, which is given the new arrays.
    """
    from mlx_lm.utils import _get_classes, dequantize_model, load_model

    def classes(config: dict[str, Any]) -> tuple[Any, Any]:
        kind, arguments = _get_classes(config)
        return (kind if skeleton is None else lambda _: skeleton), arguments

    with _readable(path, "a model"), plain_path(path) as plain:
        model, settings = load_model(
            plain, lazy=True, trust_remote_code=config.trust_remote_code, get_model_classes=classes
        )
    was_quantized = _is_quantized(model)
    if not was_quantized and (bits := execution.bits or execution.fake_quantized_bits):
        model, settings = _quantize(model, settings, bits, execution.group_size)
    if _is_quantized(model) and execution.bits is None:
        # In float32, so that the scales lose nothing before the type that is asked for.
        _cast_scales(model)
        model = dequantize_model(model)
        settings = {k: v for k, v in settings.items() if k not in ("quantization", "quantization_config")}
    if not execution.keeps_checkpoint_dtypes:
        _cast(model, _DTYPES[execution.dtype])
    return model, settings, was_quantized


class _Renewal:
    """Makes a model's arrays anew, not read yet. Its modules are made once, for that takes most of the time."""

    def __init__(self, config: ModelConfig, path: Path, execution: Execution):
        self._of = config, path, execution
        self._skeleton: nn.Module | None = None

    def __call__(self) -> nn.Module:
        model, _, _ = _unread(*self._of, self._skeleton)
        self._skeleton = model
        return model


def _notes(execution: Execution) -> list[str]:
    """What the user should know of how the weights are held."""
    if execution.device != "cpu":
        return []
    notes = []
    if execution.fake_quantized_bits:
        bits = execution.fake_quantized_bits
        notes.append(f"{bits}-bit weights are held as float32: exact, and the only fast type on a CPU")
    if execution.bits:
        notes.append("quantised weights are about 20 times slower on a CPU than model.quantization=none")
    if execution.dtype != "float32":
        notes.append("on a CPU every type but float32 is many times slower; model.precision=auto picks it")
    return notes


def load_tokenizer(config: ModelConfig, path: Path) -> TokenizerWrapper:
    """The tokenizer in the folder ``path``; no weights are read.

    Raises:
        ModelError: there is none, or it can't be read.
    """
    from mlx_lm.utils import load_config
    from mlx_lm.utils import load_tokenizer as load_wrapped

    if not any(any(path.glob(pattern)) for pattern in _TOKENIZER_FILES):
        raise ModelError(f"{path} has no tokenizer: neither tokenizer.json nor tokenizer.model")
    with _readable(path, "a tokenizer"):
        return load_wrapped(
            path,
            {"trust_remote_code": config.trust_remote_code},
            eos_token_ids=load_config(path).get("eos_token_id"),
        )


@contextlib.contextmanager
def _readable(path: Path, what: str) -> Iterator[None]:
    """Turns the errors of mlx-lm, MLX and transformers about a bad file into a ModelError of one line.

    An architecture or a tokenizer may be anybody's code and raise anything; one of mlx-lm's ends the process.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = " ".join(lines[: 2 if lines[0].endswith(":") else 1]).rstrip(":. ") if lines else type(error).__name__
        if isinstance(error, KeyError):
            reason = f"no {reason}"
        if isinstance(error, SystemExit):
            reason = "its code in mlx-lm ends the program; it may need a package that isn't installed"
        if "trust_remote_code" in str(error):
            reason = "it runs Python code of its own; read it, then set model.trust_remote_code=true"
        raise ModelError(f"{path} can't be read as {what}: {reason}") from error


def weight_format_of(model: nn.Module) -> WeightFormat:
    """How the loaded ``model`` holds its weights."""
    quantized = [module for module in model.modules() if "scales" in module]
    dtype = str(_float_dtype(model)).removeprefix("mlx.core.")
    if not quantized:
        return WeightFormat(dtype)
    return WeightFormat(dtype, int(quantized[0].bits), int(quantized[0].group_size))


def _is_quantized(model: nn.Module) -> bool:
    return any("scales" in module for module in model.modules())


def _float_dtype(model: nn.Module) -> mx.Dtype:
    """The floating-point type that holds most of the model's values."""
    sizes: Counter[mx.Dtype] = Counter()
    for _, value in tree_flatten(model.parameters()):
        if mx.issubdtype(value.dtype, mx.floating):
            sizes[value.dtype] += value.size
    return sizes.most_common(1)[0][0]


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
