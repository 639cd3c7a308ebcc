"""Converts a GGUF file of the Llama architecture to a folder that mlx-lm loads.

MLX reads Q4_0, Q4_1 and Q8_0 blocks as its own affine quantisation with groups of 32, so the weights keep their exact
quantised values. Two differences from mlx-lm are undone here: the names of the tensors, and the order of the rows of
the query and key projections, which llama.cpp interleaves for its rotary embedding (``LlamaModel.permute`` in its
``convert_hf_to_gguf.py``). The tokenizer and the chat template come from the file's metadata.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from macft.errors import ModelError

# Values of general.file_type whose tensors MLX reads without loss: F32, F16, Q4_0, Q4_1, Q8_0.
_FILE_TYPES = {0, 1, 2, 3, 7}
_GROUP_SIZE = 32
_SPECIAL_TOKEN = 3

_MODULES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_BLOCK_MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert(source: Path, folder: Path) -> None:
    """Writes the model in the GGUF file ``source`` to the existing, empty ``folder``.

    MLX doesn't check a GGUF header: a corrupt one can crash the process. Check the SHA-256 of a downloaded file first.

    Raises:
        ModelError: The file can't be read, or its architecture, quantisation, tensors or tokenizer can't be converted.
    """
    tensors, metadata = _read(source)
    try:
        _check_kind(source, metadata)
        config = _config(metadata, tied="output.weight" not in tensors)
        weights = _weights(tensors, config)
        config |= _quantization(weights)
        tokenizer = _tokenizer(metadata)
    except KeyError as error:
        raise ModelError(f"{source}: this GGUF file has no {error.args[0]}") from error
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    special = _special_ids(metadata)
    _write(folder / "config.json", config | special)
    _write(folder / "generation_config.json", special)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write(folder / "tokenizer_config.json", _tokenizer_config(metadata, config))
    if template := metadata.get("tokenizer.chat_template"):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def _read(source: Path) -> tuple[dict[str, mx.array], dict[str, Any]]:
    try:
        loaded: Any = mx.load(str(source), format="gguf", return_metadata=True)
    except (RuntimeError, ValueError) as error:
        raise ModelError(f"{source}: not a readable GGUF file ({str(error).splitlines()[0]})") from error
    tensors, metadata = loaded
    return tensors, metadata


def _check_kind(source: Path, metadata: Mapping[str, Any]) -> None:
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise ModelError(f"{source}: GGUF architecture '{architecture}' can't be converted, only 'llama'")
    file_type = metadata.get("general.file_type")
    if file_type is not None and int(file_type) not in _FILE_TYPES:
        raise ModelError(
            f"{source}: GGUF file type {int(file_type)} can't be converted, only F32, F16, Q4_0, Q4_1 and Q8_0"
        )


def _config(metadata: Mapping[str, Any], *, tied: bool) -> dict[str, Any]:
    heads = int(metadata["llama.attention.head_count"])
    hidden = int(metadata["llama.embedding_length"])
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": int(metadata["llama.feed_forward_length"]),
        "num_hidden_layers": int(metadata["llama.block_count"]),
        "num_attention_heads": heads,
        "num_key_value_heads": int(metadata.get("llama.attention.head_count_kv", heads)),
        "head_dim": int(metadata.get("llama.rope.dimension_count", hidden // heads)),
        "max_position_embeddings": int(metadata["llama.context_length"]),
        "rms_norm_eps": _decimal(metadata["llama.attention.layer_norm_rms_epsilon"]),
        "rope_theta": _decimal(metadata.get("llama.rope.freq_base", 10000.0)),
        "tie_word_embeddings": tied,
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
    }


def _decimal(value: Any) -> float:
    """A float32 as the short decimal it came from: 1e-05, not 9.999999747378752e-06."""
    return float(f"{float(value):.7g}")


def _weights(tensors: Mapping[str, mx.array], config: Mapping[str, Any]) -> dict[str, mx.array]:
    dtype = tensors.get("token_embd.scales", tensors["token_embd.weight"]).dtype
    weights = {}
    for name, value in tensors.items():
        module, _, part = name.rpartition(".")
        if module.endswith(".attn_q"):
            value = _undo_interleave(value, config["num_attention_heads"])
        elif module.endswith(".attn_k"):
            value = _undo_interleave(value, config["num_key_value_heads"])
        if mx.issubdtype(value.dtype, mx.floating):
            # GGUF keeps norms in float32; beside float16 scales they would promote every activation.
            value = value.astype(dtype)
        weights[f"{_module(module, name)}.{part}"] = value
    return weights


def _module(module: str, name: str) -> str:
    """mlx-lm's name of a GGUF module: ``blk.3.attn_q`` is ``model.layers.3.self_attn.q_proj``."""
    match module.split("."):
        case [top] if top in _MODULES:
            return _MODULES[top]
        case ["blk", number, inner] if inner in _BLOCK_MODULES and number.isdigit():
            return f"model.layers.{number}.{_BLOCK_MODULES[inner]}"
    raise ModelError(f"GGUF tensor '{name}' is not part of a plain llama model; the file can't be converted")


def _undo_interleave(value: mx.array, heads: int) -> mx.array:
    """Reorders each head's rows from (0, half, 1, half + 1, ...) to (0, 1, ..., half, half + 1, ...).

    ``value`` is (rows, columns): a weight, packed or not, or its scales or biases, which have the same rows.
    """
    rows = value.shape[0]
    return value.reshape(heads, rows // heads // 2, 2, -1).swapaxes(1, 2).reshape(value.shape)


def _quantization(weights: Mapping[str, mx.array]) -> dict[str, Any]:
    """mlx-lm's ``quantization`` entry: the most common bits, then modules with other bits; {} if not quantised."""
    bits = {}
    for name, scales in weights.items():
        module, _, part = name.rpartition(".")
        if part == "scales":
            bits[module] = weights[f"{module}.weight"].shape[-1] * 32 // (scales.shape[-1] * _GROUP_SIZE)
    if not bits:
        return {}
    default_bits = Counter(bits.values()).most_common(1)[0][0]
    entry: dict[str, Any] = {"group_size": _GROUP_SIZE, "bits": default_bits, "mode": "affine"}
    for module, module_bits in bits.items():
        if module_bits != default_bits:
            entry[module] = {"group_size": _GROUP_SIZE, "bits": module_bits, "mode": "affine"}
    return {"quantization": entry, "quantization_config": entry}


def _tokenizer(metadata: Mapping[str, Any]) -> Any:
    """A ``tokenizers.Tokenizer`` like llama.cpp's byte-level BPE with ``smollm`` or ``gpt-2`` splitting."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    model, splitting = metadata["tokenizer.ggml.model"], metadata.get("tokenizer.ggml.pre", "gpt-2")
    if model != "gpt2" or splitting not in ("smollm", "gpt-2"):
        raise ModelError(f"GGUF tokenizer '{model}' with pre-tokenizer '{splitting}' can't be converted")
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", False))
    steps: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=prefix)]
    if splitting == "smollm":
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    kinds = metadata["tokenizer.ggml.token_type"].tolist()
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == _SPECIAL_TOKEN
        ]
    )
    return tokenizer


def _special_ids(metadata: Mapping[str, Any]) -> dict[str, int]:
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    keys = {name: f"tokenizer.ggml.{key}_token_id" for name, key in names.items()}
    return {name: int(metadata[key]) for name, key in keys.items() if key in metadata}


def _tokenizer_config(metadata: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    tokens = metadata["tokenizer.ggml.tokens"]
    names = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    keys = {name: f"tokenizer.ggml.{key}_token_id" for name, key in names.items()}
    return {
        # Uses tokenizer.json unchanged; a model's own class would rebuild its pre-tokenizer.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        **{name: tokens[int(metadata[key])] for name, key in keys.items() if key in metadata},
    }


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
