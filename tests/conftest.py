"""Models shared by the tests: the bundled one, and a tiny random one of the same architecture."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from macft.model.bundled import ensure_bundled

# isort: split
import mlx.core as mx
from mlx.utils import tree_flatten

TINY_CONFIG = {
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
    "vocab_size": 49152,
    "eos_token_id": 2,
}


@pytest.fixture(scope="session")
def bundled_model() -> Path:
    """The folder of SmolLM2-135M-Instruct, in the user's cache; fetched the first time."""
    return ensure_bundled()


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory, bundled_model: Path) -> Path:
    """A random float32 llama of 2 blocks, hidden size 64, with the bundled model's tokenizer. Read only."""
    from mlx_lm.models.llama import Model, ModelArgs

    folder = tmp_path_factory.mktemp("tiny-model")
    mx.random.seed(0)
    model = Model(ModelArgs.from_dict(TINY_CONFIG))
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(TINY_CONFIG))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(bundled_model / name, folder)
    return folder
