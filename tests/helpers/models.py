"""Small random models of several architectures, and rows for them."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm import load

from macft.data.formats import Row
from macft.model.adapters.adapt import adapt
from macft.model.adapters.files import save_adapter
from macft.model.adapters.settings import AdapterConfig

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 97,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
}
FAMILIES = {
    "llama": {"tie_word_embeddings": True},
    "llama-untied": {"model_type": "llama", "tie_word_embeddings": False},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"tie_word_embeddings": True},
    "gemma": {},
    "gemma2": {"query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0},
    "gemma3_text": {"sliding_window": 16, "sliding_window_pattern": 2, "query_pre_attn_scalar": 8},
    "phi3": {},
    # Every second block has no positions, and layers are those of another architecture.
    "smollm3": {"no_rope_layer_interval": 2},
    "llama-scaled": {
        "model_type": "llama",
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "granite": {
        "logits_scaling": 8.0,
        "attention_multiplier": 0.3,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.5,
        "attention_bias": False,
        "mlp_bias": False,
    },
}

MAMBA = {
    **SMALL,
    "model_type": "mamba",
    "state_size": 8,
    "conv_kernel": 4,
    "use_bias": False,
    "use_conv_bias": True,
    "time_step_rank": 4,
    "intermediate_size": 64,
}


def make_model(family: str) -> nn.Module:
    """A random float32 model of two blocks in one of FAMILIES."""
    return make_from({**SMALL, "model_type": family, **FAMILIES[family]})


def make_from(values: dict[str, Any]) -> nn.Module:
    """A random float32 model of the config.json ``values``."""
    module = importlib.import_module(f"mlx_lm.models.{values['model_type']}")
    mx.random.seed(3)
    model = module.Model(module.ModelArgs.from_dict(values))
    mx.eval(model.parameters())
    return model


def random_rows(seed: int, *, masked: bool) -> list[Row]:
    """Rows of 9, 33, 17 and 5 tokens, with a prompt each if ``masked``."""
    generator = np.random.default_rng(seed)
    result = []
    for length in (9, 33, 17, 5):
        tokens = generator.integers(1, SMALL["vocab_size"], length).astype(np.int32)
        result.append(Row(tokens, prompt_length=int(generator.integers(1, length - 1)) if masked else 0))
    return result


def assert_same_gradient(gradient: dict[str, mx.array], expected: dict[str, mx.array], rtol: float) -> None:
    """Equal up to ``rtol`` of each value, and of the largest value of all."""
    largest = max(float(mx.abs(value).max()) for value in expected.values())
    assert largest > 0
    assert gradient.keys() == expected.keys()
    for name, value in gradient.items():
        np.testing.assert_allclose(np.array(value), np.array(expected[name]), rtol=rtol, atol=rtol * largest)


def random_adapter(folder: Path, base: Path, config: AdapterConfig) -> nn.Module:
    """Saves a random adapter of the model in ``base``; returns the model with it."""
    model = load(str(base))[0]
    settings = adapt(model, config, seed=1).mlx_lm_config
    model.update(
        nn.utils.tree_map(lambda value: value + 0.1 * mx.random.normal(value.shape), model.trainable_parameters())
    )
    save_adapter(folder, model, settings, model_name=str(base))
    model.eval()
    return model
