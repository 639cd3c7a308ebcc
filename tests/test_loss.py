"""The loss is mlx-lm's, computed on target positions only."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.trainer import default_loss
from mlx_lm.tuner.utils import linear_to_lora_layers

from helpers.computing import execution_with, gradient_computer, randomize_adapter
from helpers.models import FAMILIES, assert_same_gradient, make_model, random_rows
from macft.data.batch import collate
from macft.data.formats import Row
from macft.model.adapt import adapt
from macft.model.adapter_settings import AdapterConfig
from macft.model.backends.choose import make_backend
from macft.model.head import split_head
from macft.training.gradient import GradientComputer
from macft.training.loss import target_positions


@pytest.mark.parametrize("family", FAMILIES)
def test_split_head_makes_the_models_own_logits(family: str) -> None:
    model = make_model(family)
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
def test_loss_and_gradient_are_those_of_mlx_lm(kind: str, masked: bool, kernels: str) -> None:
    """mlx-lm's own tuner and loss on the same rows and the same initial adapter."""
    ours, theirs = make_model("llama"), make_model("llama")
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
    data = random_rows(7, masked=masked)
    batch = collate(data, np.arange(len(data)))
    # mlx-lm counts the padding token that follows a row as a target too; ending each row one earlier takes it out.
    lengths = mx.array(np.stack([np.maximum(batch.prompt_lengths, 1), batch.lengths - 1], axis=1))

    (mean, count), gradient = nn.value_and_grad(theirs, default_loss)(theirs, mx.array(batch.tokens), lengths)
    with gradient_computer(ours, adaptation, kernels) as compute:
        local = compute(0, [batch])

    assert local.target_tokens == int(count.item())
    assert local.loss_sum == pytest.approx(mean.item() * count.item(), rel=1e-5)
    expected = dict(tree_flatten(gradient))
    assert_same_gradient(local.gradient, {name: expected[name] * count for name in local.gradient}, rtol=2e-4)
    assert sorted(expected) == sorted(name for bucket in local.buckets for name in bucket)


def test_micro_batches_add_up_to_the_batch(kernels: str) -> None:
    model = make_model("llama")
    adaptation = adapt(model, AdapterConfig(rank=4, dropout=0.3), seed=1)
    randomize_adapter(model)
    data, ids = random_rows(2, masked=True), np.array([4, 8, 15, 16])
    with gradient_computer(model, adaptation, kernels) as compute:
        whole = compute(3, [collate(data, ids)])
        parts = compute(3, [collate([data[i]], ids[i : i + 1]) for i in (2, 0, 3, 1)])
    assert parts.target_tokens == whole.target_tokens
    assert parts.loss_sum == pytest.approx(whole.loss_sum, rel=1e-5)
    assert_same_gradient(parts.gradient, whole.gradient, rtol=1e-4)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("packing", [False, True])
def test_gradient_checkpointing_changes_nothing(packing: bool, dropout: float, kernels: str) -> None:
    gradients = []
    for recompute in ("none", "blocks"):
        model = make_model("qwen2")
        adaptation = adapt(model, AdapterConfig(rank=4, dropout=dropout), seed=1)
        randomize_adapter(model)
        with gradient_computer(model, adaptation, kernels, packing=packing, recompute=recompute) as compute:
            gradients.append(compute(0, [collate(random_rows(2, masked=False), np.arange(4))]).gradient)
    assert_same_gradient(gradients[0], gradients[1], rtol=1e-5)


def test_it_asks_before_each_micro_batch_when_all_before_is_computed(kernels: str) -> None:
    """With an answer for each micro-batch, however many parts it has, and for none where there are none."""
    model = make_model("llama")
    adaptation = adapt(model, AdapterConfig(rank=4), seed=1)
    data, asked = random_rows(2, masked=True), []
    with gradient_computer(model, adaptation, kernels, packing=True) as compute:
        compute(0, [collate([row], np.array([i])) for i, row in enumerate(data)], lambda: asked.append(1))
        assert len(asked) == len(data)
        nothing = compute(1, [], lambda: asked.append(1))
    assert len(asked) == len(data)
    assert nothing.target_tokens == 0
    assert all(not np.array(value).any() for value in nothing.gradient.values())


def test_packs_need_an_installed_model(kernels: str) -> None:
    model = make_model("llama")
    adaptation = adapt(model, AdapterConfig(rank=4), seed=1)
    execution = execution_with(kernels, packing=True)
    with pytest.raises(RuntimeError, match="installed"):
        GradientComputer(model, make_backend(execution), execution, adaptation.dropout_keys, seed=0)
