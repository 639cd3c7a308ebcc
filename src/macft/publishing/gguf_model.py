"""Writes a model as a GGUF file, the format of llama.cpp, Ollama and LM Studio.

The names of tensors are those of the package ``gguf``, which llama.cpp's own converter uses. What else differs for the
architectures here: llama.cpp's ``llama`` rotates neighbouring values of a head where Hugging Face's and MLX's rotate
those half a head apart, so the rows of query and key are reordered; and scaled frequencies of Llama 3 are a tensor.
The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from macft.errors import ConfigError, ModelError
from macft.model.load import LoadedModel
from macft.publishing.gguf_vocabulary import add_vocabulary, read_tokenizer, scheme

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

# model_type in config.json -> llama.cpp's architecture.
_ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "smollm3": "smollm3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
}
_INTERLEAVED = {"llama", "smollm3"}
_SMOLLM3_INTERVAL = 4


def check_gguf(folder: Path) -> None:
    """Checks that the model in ``folder`` can be written as GGUF, before it is loaded.

    Raises:
        ConfigError: It can't: its architecture, its positions or its tokenizer.
        ModelError: Its files can't be read.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder / 'config.json'} can't be read: {error}") from error
    kind = config.get("model_type")
    if kind not in _ARCHITECTURES:
        raise ConfigError(
            f"--export-gguf: macft writes {', '.join(_ARCHITECTURES)}, and this is {kind}; "
            "convert the fused folder with llama.cpp's convert_hf_to_gguf.py"
        )
    _check_positions(config.get("rope_scaling") or config.get("rope_parameters"))
    if "sliding_attention" in (config.get("layer_types") or ()):
        raise ConfigError("--export-gguf: this model has layers with a sliding window, which macft doesn't write")
    interval = config.get("no_rope_layer_interval", _SMOLLM3_INTERVAL)
    layers = range(1, config.get("num_hidden_layers", 0) + 1)
    usual = [int(layer % _SMOLLM3_INTERVAL != 0) for layer in layers]
    if kind == "smollm3" and (interval != _SMOLLM3_INTERVAL or (config.get("no_rope_layers") or usual) != usual):
        raise ConfigError(
            "--export-gguf: llama.cpp's smollm3 leaves out positions in every fourth layer, this one elsewhere"
        )
    if (folder / "tokenizer.json").is_file():  # else it is made when the model is loaded
        scheme(read_tokenizer(folder))


def _check_positions(scaling: Mapping[str, Any] | None) -> None:
    if _scaling(scaling) not in ("default", "linear", "llama3"):
        raise ConfigError(
            f"--export-gguf: macft doesn't write rope scaling of type {_scaling(scaling)}; "
            "convert the fused folder with llama.cpp's convert_hf_to_gguf.py"
        )


def _scaling(scaling: Mapping[str, Any] | None) -> str:
    return str((scaling or {}).get("type") or (scaling or {}).get("rope_type") or "default")


def write_gguf(path: Path, loaded: LoadedModel, folder: Path, *, kind: str, name: str) -> None:
    """Writes ``loaded`` to ``path``, tensor by tensor; its weights are gone afterwards.

    Args:
        path: The file to write.
        loaded: The model, with any adapter fused. Quantised weights are written with the values they stand for.
        folder: Where the model was saved, with its tokenizer.
        kind: One of :data:`GGUF_TYPES`. Vectors are float32, and so are tensors whose rows don't divide into
            blocks.
        name: Of the model, which programs show.

    Raises:
        ConfigError: Values are too large for float16, or the tokenizer can't be written.
        ModelError: A tensor isn't one of the architecture's.
        OSError: The file can't be written.
    """
    import gguf

    args = loaded.model.args
    architecture = _ARCHITECTURES[loaded.config["model_type"]]
    writer = gguf.GGUFWriter(path, architecture)
    names = gguf.get_tensor_name_map(
        {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}[architecture], args.num_hidden_layers
    )
    writer.add_name(name)
    writer.add_file_type(getattr(gguf.LlamaFileType, "ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"))
    _add_shape(writer, args)
    shapes = {tensor: shape for tensor, shape, _ in _tensors(loaded, evaluate=False)}
    add_vocabulary(writer, folder, rows=shapes["model.embed_tokens.weight"][0])

    tensors: list[tuple[str, str, GGMLQuantizationType]] = []
    if _scaling(args.rope_scaling) == "llama3":
        _announce(writer, "rope_freqs.weight", (_head_dim(args) // 2,), gguf.GGMLQuantizationType.F32)
    for ours, shape in shapes.items():
        theirs = names.get_name(ours, try_suffixes=(".weight", ".bias"))
        if theirs is None:
            raise ModelError(f"--export-gguf: llama.cpp's {architecture} has no tensor like {ours}")
        stored = _stored(shape, kind)
        _announce(writer, theirs, shape, stored)
        tensors.append((ours, theirs, stored))

    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if _scaling(args.rope_scaling) == "llama3":
            writer.write_tensor_data(_llama3_factors(args))
        for (ours, theirs, stored), (_, _, value) in zip(tensors, _tensors(loaded, evaluate=True), strict=True):
            writer.write_tensor_data(_data(_ordered(value, theirs, architecture, args), stored, ours))
    finally:
        writer.close()


def _add_shape(writer: GGUFWriter, args: Any) -> None:
    import gguf

    writer.add_context_length(args.max_position_embeddings or 2048)
    writer.add_embedding_length(args.hidden_size)
    writer.add_block_count(args.num_hidden_layers)
    writer.add_feed_forward_length(args.intermediate_size)
    writer.add_head_count(args.num_attention_heads)
    writer.add_head_count_kv(args.num_key_value_heads)
    writer.add_key_length(_head_dim(args))
    writer.add_value_length(_head_dim(args))
    writer.add_rope_dimension_count(_head_dim(args))
    writer.add_layer_norm_rms_eps(args.rms_norm_eps)
    writer.add_rope_freq_base(args.rope_theta)
    writer.add_vocab_size(args.vocab_size)
    if _scaling(args.rope_scaling) == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(args.rope_scaling["factor"])


def _head_dim(args: Any) -> int:
    return int(getattr(args, "head_dim", None) or args.hidden_size // args.num_attention_heads)


def _tensors(loaded: LoadedModel, *, evaluate: bool) -> Iterator[tuple[str, tuple[int, ...], mx.array]]:
    """Name, shape and float32 values of each tensor, quantised ones in full.

    If not ``evaluate``, values aren't computed; else each is given up afterwards.
    """
    modules = dict(loaded.model.named_modules())
    pending = list(reversed(tree_flatten(loaded.model.parameters())))
    while pending:
        name, value = pending.pop()
        module = modules[name.rpartition(".")[0]]
        if hasattr(module, "scales"):
            if not name.endswith(".weight"):
                if name.endswith(".bias"):
                    yield name, value.shape, value.astype(mx.float32)
                continue  # scales and biases, of the blocks
            value = mx.dequantize(
                value, module.scales, module.get("biases"), module.group_size, module.bits, mode=module.mode
            )
        value = value.astype(mx.float32)  # lazily: shapes alone cost nothing
        if evaluate:
            mx.eval(value)
        yield name, value.shape, value
        if evaluate:  # what is written is given up, for the memory
            used = ("weight", "scales", "biases") if hasattr(module, "scales") else (name.rpartition(".")[2],)
            for part in used:
                if part in module:
                    module[part] = mx.array([])


def _stored(shape: tuple[int, ...], kind: str) -> GGMLQuantizationType:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if len(shape) < 2:
        return GGMLQuantizationType.F32
    stored = GGMLQuantizationType[kind.upper()]
    return stored if shape[-1] % GGML_QUANT_SIZES[stored][0] == 0 else GGMLQuantizationType.F32


def _announce(writer: GGUFWriter, name: str, shape: tuple[int, ...], stored: GGMLQuantizationType) -> None:
    from gguf import GGML_QUANT_SIZES

    block, size = GGML_QUANT_SIZES[stored]
    # Any type but uint8, which would stand for a shape in bytes.
    writer.add_tensor_info(name, shape, np.dtype(np.float32), int(np.prod(shape)) // block * size, raw_dtype=stored)


def _ordered(value: mx.array, name: str, architecture: str, args: Any) -> mx.array:
    """Where llama.cpp wants it, each head's rows (0, 1, ..., half, ...) in the order (0, half, 1, half + 1, ...)."""
    if architecture not in _INTERLEAVED:
        return value
    if ".attn_q." in name:
        heads = args.num_attention_heads
    elif ".attn_k." in name:
        heads = args.num_key_value_heads
    else:
        return value
    return value.reshape(heads, 2, value.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(value.shape)


def _data(value: mx.array, stored: GGMLQuantizationType, name: str) -> np.ndarray[Any, Any]:
    from gguf import quants

    with np.errstate(over="ignore"):
        data = quants.quantize(np.array(value), stored)
    if data.dtype == np.float16 and not np.isfinite(data).all():
        raise ConfigError(f"--gguf-type: {name} has values that float16 can't hold; choose bf16")
    return data


def _llama3_factors(args: Any) -> np.ndarray[Any, Any]:
    """By what the frequencies of Llama 3.1 and later are divided; (head_dim / 2,), float32.

    As ``transformers.modeling_rope_utils._compute_llama3_parameters``.
    """
    scaling = args.rope_scaling
    low, high = float(scaling.get("low_freq_factor", 1.0)), float(scaling.get("high_freq_factor", 4.0))
    factor, old = float(scaling["factor"]), float(scaling.get("original_max_position_embeddings", 8192))
    size = _head_dim(args)
    wavelengths = 2 * np.pi * args.rope_theta ** (np.arange(0, size, 2, dtype=np.float64) / size)
    smooth = (old / wavelengths - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    factors = np.where(wavelengths < old / high, 1.0, np.where(wavelengths > old / low, factor, between))
    return factors.astype(np.float32)
