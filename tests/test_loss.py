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

from harness.execution import execution_with
from helpers.computing import gradient_computer, randomize_adapter, settled_memory, token_loss
from helpers.models import FAMILIES, MAMBA, SMALL, assert_same_gradient, make_from, make_model, random_rows
from macft.data.batch import collate
from macft.data.formats import Row
from macft.model.adapters.adapt import Adaptation, adapt
from macft.model.adapters.settings import AdapterConfig
from macft.model.backends.choose import make_backend
from macft.model.backends.mlx.cross_entropy import chunked_cross_entropy
from macft.model.backends.mlx.recurrence import chunked_recurrences, find_recurrences
from macft.model.head import split_head
from macft.training.gradients.gradient import GradientComputer
from macft.training.targets import target_positions

TEXT = {
    **SMALL,
    "model_type": "gemma3_text",
    "query_pre_attn_scalar": 8,
    "sliding_window": 16,
    "sliding_window_pattern": 2,
    "rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0]},
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 2,
    "tie_word_embeddings": True,
}
GPT2 = {"n_ctx": 128, "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 128, "layer_norm_epsilon": 1e-5}
JAMBA = {
    "model_type": "jamba",
    "attn_layer_offset": 1,
    "attn_layer_period": 2,
    "expert_layer_offset": 1,
    "expert_layer_period": 2,
    "mamba_d_conv": 4,
    "mamba_d_state": 8,
    "mamba_expand": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "mamba_proj_bias": False,
    "mamba_conv_bias": True,
    "mamba_dt_rank": 4,
}
WRAPPED = {
    "gemma3": {"model_type": "gemma3", "vocab_size": 97, "text_config": TEXT},
    "qwen3_vl": {"model_type": "qwen3_vl", "text_config": {**TEXT, "model_type": "qwen3_vl_text"}},
    "mamba": MAMBA,
    "phi": {**SMALL, "model_type": "phi", "layer_norm_eps": 1e-5, "partial_rotary_factor": 0.5},
    "gpt2": {**SMALL, "model_type": "gpt2", "num_key_value_heads": 4, **GPT2},
}
RECURRENT = {
    "qwen3_5": {"model_type": "qwen3_5", "text_config": {**TEXT, "model_type": "qwen3_5_text"}},
    "mamba": MAMBA,
    "jamba": {**SMALL, **JAMBA},
}


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


@pytest.mark.parametrize("family", WRAPPED)
def test_the_head_is_split_wherever_the_backbone_is(family: str, kernels: str) -> None:
    """Behind wrappers, under other names, with other arguments: the model's own logits, and the same gradient."""
    model = make_from(WRAPPED[family])
    adaptation = adapt(model, AdapterConfig(rank=4), seed=1)
    randomize_adapter(model)
    model.train()
    parts = split_head(model)
    assert parts is not None
    backbone, head = parts
    assert head.is_frozen
    tokens = mx.array(np.random.default_rng(0).integers(1, 97, (2, 11)))
    whole = np.array(model(tokens))
    np.testing.assert_allclose(np.array(head(backbone(tokens)[:, 3:5])), whole[:, 3:5], rtol=1e-5, atol=1e-5)
    assert_gradient_of_mlx_lm(model, adaptation, kernels, rows=2, length=24)


def test_a_wide_vocabulary_needs_no_more_memory_behind_a_wrapper(kernels: str) -> None:
    text = {**WRAPPED["gemma3"]["text_config"], "vocab_size": 20000}
    peaks = []
    for config in (text, {"model_type": "gemma3", "vocab_size": 20000, "text_config": text}):
        model = make_from(config)
        adaptation = adapt(model, AdapterConfig(rank=4), seed=1)
        tokens = np.random.default_rng(0).integers(1, 97, (4, 65)).astype(np.int32)
        with gradient_computer(model, adaptation, kernels) as compute:
            batch = collate([Row(row, prompt_length=60) for row in tokens], np.arange(4))
            before = settled_memory()
            mx.eval(compute(0, [batch]).gradient)
            peaks.append(mx.get_peak_memory() - before)
    logits = 4 * 4 * 64 * 20000
    assert peaks[1] < 1.25 * peaks[0]  # how far MLX runs ahead differs
    assert peaks[1] < logits


@pytest.mark.slow
@pytest.mark.parametrize("family", RECURRENT)
def test_layers_that_loop_over_time_hold_little_and_compute_the_same(family: str, kernels: str) -> None:
    model = make_from(RECURRENT[family])
    adaptation = adapt(model, AdapterConfig(rank=4, num_layers=-1), seed=1)
    randomize_adapter(model)
    ours, theirs = assert_gradient_of_mlx_lm(model, adaptation, kernels, rows=4, length=112)
    assert ours < theirs


def test_chunks_of_time_have_the_dropout_of_the_whole() -> None:
    gradients = []
    for chunk in (8, 1000):
        model = make_from(RECURRENT["qwen3_5"])
        adaptation = adapt(model, AdapterConfig(rank=4, dropout=0.3), seed=1)
        randomize_adapter(model)
        layers = find_recurrences(model)
        assert len(layers) == 1
        with chunked_recurrences(layers, chunk=chunk), adaptation.dropout_keys.using(mx.array([5, 6], mx.uint32)):
            model.train()
            tokens = mx.array(np.random.default_rng(0).integers(1, 97, (2, 30)))
            gradient = nn.value_and_grad(model, lambda model=model, tokens=tokens: (model(tokens) ** 2).mean())()[1]
            gradients.append(dict(tree_flatten(gradient)))
    assert_same_gradient(gradients[0], gradients[1], rtol=1e-4)


def assert_gradient_of_mlx_lm(
    model: nn.Module, adaptation: Adaptation, kernels: str, *, rows: int, length: int
) -> tuple[int, int]:
    """Loss and gradient of ``model`` are those of mlx-lm's own loss; the peak memory of both, bytes."""
    tokens = np.random.default_rng(0).integers(1, 97, (rows, length + 1)).astype(np.int32)
    batch = collate([Row(row, prompt_length=length // 2) for row in tokens], np.arange(rows))
    lengths = mx.array(np.stack([batch.prompt_lengths, batch.lengths - 1], axis=1))
    model.train()
    before = settled_memory()
    (mean, count), gradient = nn.value_and_grad(model, default_loss)(model, mx.array(batch.tokens), lengths)
    expected = {name: value * count for name, value in tree_flatten(gradient)}
    mx.eval(mean, expected)
    theirs = mx.get_peak_memory() - before
    with gradient_computer(model, adaptation, kernels) as compute:
        before = settled_memory()
        local = compute(0, [batch])
        mx.eval(local.gradient)
        ours = mx.get_peak_memory() - before
    assert local.loss_sum == pytest.approx((mean * count).item(), rel=2e-6)
    assert_same_gradient(local.gradient, expected, rtol=1e-4)
    return ours, theirs


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
    assert sorted(expected) == sorted(name for bucket in local.buckets for piece in bucket for name in piece.names)


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


def test_validation_never_has_all_logits() -> None:
    """The loss is that of all positions at once. MLX hands over the logits of up to ten chunks in advance."""
    count, vocabulary = 1536, 8192
    model = make_from({**SMALL, "model_type": "llama", "vocab_size": vocabulary, "tie_word_embeddings": False})
    model.eval()
    tokens = mx.arange(count)[None] % 97
    targets = mx.full((count,), 3)
    whole = nn.losses.cross_entropy(model(tokens)[0], targets, reduction="sum").item()
    with token_loss(model, "mlx", loss_chunk=32) as (loss, _):
        before = settled_memory()
        assert loss(tokens, mx.arange(count), targets, mx.ones(count)).item() == pytest.approx(whole, rel=1e-5)
    assert mx.get_peak_memory() - before < count * vocabulary * 4


@pytest.mark.parametrize(("dtype", "bytes_per_logit"), [("bfloat16", 12), ("float32", 16)])
def test_the_loss_holds_few_arrays_of_logits(dtype: str, bytes_per_logit: int) -> None:
    """mlx-lm's holds 13 bytes for each logit in 16 bits. The gradient is exact for any weights."""
    count, vocabulary = 64, 16384
    mx.random.seed(0)
    matrix, hidden = (mx.random.normal(shape).astype(getattr(mx, dtype)) for shape in ((vocabulary, 8), (count, 8)))
    targets, weights = mx.arange(count) * 7, mx.arange(count) % 3 * 0.5

    def loss(hidden: mx.array) -> mx.array:
        return chunked_cross_entropy(lambda x: x @ matrix.T, hidden, targets, weights, chunk=count)

    def plain(hidden: mx.array) -> mx.array:
        logits = hidden @ matrix.astype(mx.float32).T
        return (nn.losses.cross_entropy(logits, targets) * weights).sum()

    mx.eval(matrix, hidden)
    before = settled_memory()
    found = mx.value_and_grad(loss)(hidden)
    mx.eval(found)
    assert mx.get_peak_memory() - before < (bytes_per_logit + 2) * count * vocabulary
    exact = mx.value_and_grad(plain)(hidden.astype(mx.float32))
    tolerance = 1e-5 if dtype == "float32" else 0.03
    for ours, theirs in zip(found, exact, strict=True):
        np.testing.assert_allclose(np.array(ours.astype(mx.float32)), np.array(theirs), rtol=tolerance, atol=tolerance)
