"""The loss is mlx-lm's, computed on target positions only."""

from __future__ import annotations

import importlib
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.trainer import default_loss
from mlx_lm.tuner.utils import linear_to_lora_layers

from macft.data.batch import collate
from macft.data.formats import Row
from macft.model.adapt import adapt
from macft.model.adapter_settings import AdapterConfig
from macft.training.gradient import GradientComputer
from macft.training.loss import split_head, target_positions

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


def make(family: str) -> nn.Module:
    values = {**SMALL, "model_type": family, **FAMILIES[family]}
    module = importlib.import_module(f"mlx_lm.models.{values['model_type']}")
    mx.random.seed(3)
    model = module.Model(module.ModelArgs.from_dict(values))
    mx.eval(model.parameters())
    return model


def rows(seed: int, *, masked: bool) -> list[Row]:
    generator = np.random.default_rng(seed)
    result = []
    for length in (9, 33, 17, 5):
        tokens = generator.integers(1, SMALL["vocab_size"], length).astype(np.int32)
        result.append(Row(tokens, prompt_length=int(generator.integers(1, length - 1)) if masked else 0))
    return result


@pytest.mark.parametrize("family", FAMILIES)
def test_split_head_makes_the_models_own_logits(family: str) -> None:
    model = make(family)
    parts = split_head(model)
    assert parts is not None
    backbone, head = parts
    tokens = mx.array(np.random.default_rng(0).integers(1, 97, (2, 11)))
    whole = np.array(model(tokens))
    selected = np.array(head(backbone(tokens)[:, 3:5]))
    np.testing.assert_allclose(selected, whole[:, 3:5], rtol=1e-5, atol=1e-5)


def test_a_model_without_a_backbone_is_used_whole() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = []
            self.table = nn.Embedding(20, 20)

        def __call__(self, tokens: Any) -> Any:
            return self.table(tokens)

    assert split_head(Odd()) is None


def test_targets_are_the_tokens_after_the_prompt() -> None:
    tokens = np.arange(10, 16, dtype=np.int32)
    batch = collate([Row(tokens, prompt_length=4), Row(tokens[:3], prompt_length=0)], np.array([0, 1]))
    positions, targets, weights = target_positions(batch)
    width = batch.tokens.shape[1] - 1
    real = weights == 1
    assert positions[real].tolist() == [3, 4, width + 0, width + 1]
    assert targets[real].tolist() == [14, 15, 11, 12]
    assert len(weights) % 32 == 0


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_loss_and_gradient_are_those_of_mlx_lm(kind: str, masked: bool) -> None:
    """mlx-lm's own tuner and loss on the same rows and the same initial adapter."""
    ours, theirs = make("llama"), make("llama")
    adaptation = adapt(ours, AdapterConfig(type=kind, rank=4), seed=1)
    theirs.freeze()
    linear_to_lora_layers(theirs, 2, {"rank": 4, "scale": 20.0, "dropout": 0.0}, use_dora=kind == "dora")
    # B starts at zero, which would leave A without gradient: give both the same random values.
    values = [
        (name, mx.random.normal(value.shape) * 0.1 + value) for name, value in tree_flatten(ours.trainable_parameters())
    ]
    mx.eval([value for _, value in values])
    for model in (ours, theirs):
        model.load_weights(values, strict=False)
    data = rows(7, masked=masked)
    batch = collate(data, np.arange(len(data)))
    # mlx-lm counts the padding token that follows a row as a target too; ending each row one earlier takes it out.
    lengths = mx.array(np.stack([np.maximum(batch.prompt_lengths, 1), batch.lengths - 1], axis=1))

    (mean, count), gradient = nn.value_and_grad(theirs, default_loss)(theirs, mx.array(batch.tokens), lengths)
    compute = GradientComputer(ours, adaptation.dropout_keys, seed=0, checkpoint_blocks=False)
    local = compute(0, [batch])

    assert local.target_tokens == int(count.item())
    assert local.loss_sum == pytest.approx(mean.item() * count.item(), rel=1e-5)
    expected = dict(tree_flatten(gradient))
    same_gradient(local.gradient, {name: expected[name] * count for name in local.gradient}, rtol=2e-4)
    assert sorted(expected) == sorted(name for bucket in local.buckets for name in bucket)


def same_gradient(found: dict[str, mx.array], expected: dict[str, mx.array], rtol: float) -> None:
    largest = max(float(mx.abs(value).max()) for value in expected.values())
    assert largest > 0
    assert found.keys() == expected.keys()
    for name, value in found.items():
        np.testing.assert_allclose(np.array(value), np.array(expected[name]), rtol=rtol, atol=rtol * largest)


def test_micro_batches_add_up_to_the_batch() -> None:
    model = make("llama")
    adaptation = adapt(model, AdapterConfig(rank=4, dropout=0.3), seed=1)
    values = [(name, mx.random.normal(value.shape) * 0.1) for name, value in tree_flatten(model.trainable_parameters())]
    model.load_weights(values, strict=False)
    compute = GradientComputer(model, adaptation.dropout_keys, seed=0, checkpoint_blocks=False)
    data, ids = rows(2, masked=True), np.array([4, 8, 15, 16])
    whole = compute(3, [collate(data, ids)])
    parts = compute(3, [collate([data[i]], ids[i : i + 1]) for i in (2, 0, 3, 1)])
    assert parts.target_tokens == whole.target_tokens
    assert parts.loss_sum == pytest.approx(whole.loss_sum, rel=1e-5)
    same_gradient(parts.gradient, whole.gradient, rtol=1e-4)


def test_gradient_checkpointing_changes_nothing() -> None:
    gradients = []
    for checkpoint in (False, True):
        model = make("qwen2")
        adaptation = adapt(model, AdapterConfig(rank=4), seed=1)
        layer_class, plain = type(model.layers[0]), type(model.layers[0]).__call__
        try:
            compute = GradientComputer(model, adaptation.dropout_keys, seed=0, checkpoint_blocks=checkpoint)
            gradients.append(compute(0, [collate(rows(2, masked=False), np.arange(4))]).gradient)
        finally:
            layer_class.__call__ = plain
    same_gradient(gradients[0], gradients[1], rtol=1e-5)
