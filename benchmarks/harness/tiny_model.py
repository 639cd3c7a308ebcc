"""A tiny random model with the bundled model's architecture and the beginning of its tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

TINY_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    # Small: with the bundled model's 49152 tokens a tiny run would spend nearly all its time on logits.
    "vocab_size": 4096,
    "eos_token_id": 2,
}


def make_tiny_model(folder: Path, bundled_model: Path, config: dict[str, Any] = TINY_CONFIG) -> Path:
    """Writes a random float32 llama of ``config`` into ``folder``; its tokenizer begins as the bundled model's."""
    from mlx_lm.models.llama import Model, ModelArgs

    mx.random.seed(0)
    model = Model(ModelArgs.from_dict(config))
    weights = dict(tree_flatten(model.parameters()))
    folder.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))
    write_first_tokens(folder, bundled_model, config["vocab_size"])
    return folder


def write_first_tokens(folder: Path, bundled_model: Path, count: int) -> None:
    """Writes the tokenizer of the bundled model with its first ``count`` tokens only into ``folder``."""
    (folder / "tokenizer.json").write_text(_first_tokens(bundled_model / "tokenizer.json", count))
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(bundled_model / name, folder)


def _first_tokens(tokenizer: Path, count: int) -> str:
    """A BPE tokenizer with the first ``count`` tokens only, and the merges that lead to them."""
    content = json.loads(tokenizer.read_text())
    bpe = content["model"]
    bpe["vocab"] = {token: number for token, number in bpe["vocab"].items() if number < count}
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in bpe["merges"]]
    bpe["merges"] = [pair for pair in pairs if {*pair, "".join(pair)} <= bpe["vocab"].keys()]
    return json.dumps(content)
