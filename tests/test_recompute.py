"""Gradients are mlx-lm's whatever the backward pass computes again, and little is held where it computes more."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.base import create_causal_mask, scaled_dot_product_attention
from mlx_lm.tuner.trainer import default_loss

from harness.families import configuration, new_model
from harness.launches import launches
from harness.step_peaks import StepCase, step_peaks
from helpers.computing import gradient_computer, randomize_adapter, settled_memory
from helpers.models import SMALL, assert_same_gradient, make_from, make_model
from macft.data.batch import collate
from macft.data.formats import Row
from macft.device.chips import known_chips
from macft.model.adapters.adapt import Adaptation, adapt
from macft.model.adapters.settings import AdapterConfig
from macft.model.backends.mlx.kept import recorded
from macft.model.backends.mlx.query_blocks import attention_in_blocks
from macft.model.backends.mlx.recompute import kept_attention
from macft.model.execution import Execution
from macft.training.gradients.gradient import LocalGradient

# Blocks of 32 queries for the rows below.
SCORES = 32 * 4 * 3 * 100
PLAIN = {**SMALL, "model_type": "llama", "hidden_size": 64, "intermediate_size": 64}
WAYS = [("cheap", False), ("cheap", True), ("blocks", False), ("blocks", True)]


def rows(vocabulary: int = 97) -> list[Row]:
    generator = np.random.default_rng(3)
    return [Row(generator.integers(1, vocabulary, n).astype(np.int32), 4) for n in (100, 70, 90)]


def adapted(
    model: nn.Module, kind: str, *, bits: int | None = None, scale: float = 0.1, **more: Any
) -> tuple[nn.Module, Adaptation]:
    if bits:
        nn.quantize(model, group_size=32, bits=bits)
    adaptation = adapt(model, AdapterConfig(type=kind, rank=4, **more), seed=1)
    if kind != "full":
        randomize_adapter(model, scale=scale)
    return model, adaptation


def computed(model: nn.Module, adaptation: Adaptation, **fields: Any) -> LocalGradient:
    with gradient_computer(model, adaptation, "mlx", max_scores=SCORES, **fields) as compute:
        return compute(3, [collate(rows(), np.arange(3))])


def assert_as_mlx_lm(model: nn.Module, found: LocalGradient) -> None:
    """Loss and gradient are mlx-lm's own, of the float32 ``model``, within 1e-5."""
    batch = collate(rows(), np.arange(3))
    lengths = mx.array(np.stack([batch.prompt_lengths, batch.lengths - 1], axis=1))
    model.train()
    (loss, count), gradient = nn.value_and_grad(model, default_loss)(model, mx.array(batch.tokens), lengths)
    assert found.loss_sum / found.target_tokens == pytest.approx(loss.item(), rel=1e-6)
    assert_same_gradient(found.gradient, {name: value * count for name, value in tree_flatten(gradient)}, rtol=1e-5)


@pytest.mark.parametrize(("recompute", "packing"), WAYS)
@pytest.mark.parametrize(("kind", "bits"), [("lora", None), ("lora", 4), ("dora", None), ("full", None)])
def test_the_gradient_is_mlx_lm_s(kind: str, bits: int | None, recompute: str, packing: bool) -> None:
    model, adaptation = adapted(make_from(PLAIN), kind, bits=bits)
    assert_as_mlx_lm(model, computed(model, adaptation, recompute=recompute, packing=packing))


@pytest.mark.parametrize("recompute", ["cheap", "blocks"])
@pytest.mark.parametrize("family", ["gemma3_text", "deepseek_v2", "gpt_oss", "qwen3_moe", "afm7"])
def test_windows_masks_from_tokens_sinks_experts_and_fused_layers_too(family: str, recompute: str) -> None:
    model, adaptation = adapted(new_model(configuration(family)), "lora")
    assert_as_mlx_lm(model, computed(model, adaptation, recompute=recompute))


def test_sinks_that_are_trained_have_their_gradient() -> None:
    model, adaptation = adapted(new_model(configuration("gpt_oss")), "full")
    found = computed(model, adaptation, recompute="cheap")
    assert any(name.endswith("sinks") for name in found.gradient)
    assert_as_mlx_lm(model, found)


@pytest.mark.parametrize(("recompute", "packing"), WAYS)
def test_dropout_has_the_same_masks_when_it_is_computed_again(recompute: str, packing: bool) -> None:
    model, adaptation = adapted(make_model("llama"), "lora", dropout=0.3)
    expected = computed(model, adaptation)
    found = computed(model, adaptation, recompute=recompute, packing=packing)
    assert_same_gradient(found.gradient, expected.gradient, rtol=1e-5)


@pytest.mark.parametrize("recompute", ["cheap", "blocks"])
def test_a_compiled_step_computes_again_too(recompute: str) -> None:
    """MLX unites equal parts of a graph when it compiles one: then nothing would be saved, and nothing be wrong."""
    model, adaptation = adapted(make_model("llama"), "lora")
    expected = computed(model, adaptation)
    assert_same_gradient(
        computed(model, adaptation, recompute=recompute, compiled=True).gradient, expected.gradient, rtol=1e-5
    )


@pytest.mark.parametrize("mask", ["causal", "none", "window", "by row", "numbers"])
@pytest.mark.parametrize("key_heads", [1, 4])
def test_attention_in_blocks_is_attention(mask: str, key_heads: int) -> None:
    """Whether blocks are computed again, held, or without a gradient."""
    length = 75
    mx.random.seed(0)
    queries, cotangent = (mx.random.normal((2, 4, length, 8)) for _ in range(2))
    keys, values = (mx.random.normal((2, key_heads, length, 8)) for _ in range(2))
    masks: dict[str, Any] = {
        "causal": "causal",
        "none": None,
        "window": create_causal_mask(length, window_size=9),
        "by row": create_causal_mask(length)[None, None] & (mx.random.uniform(shape=(2, 1, 1, length)) < 0.9),
        "numbers": mx.random.normal((2, 4, length, length)),
    }
    given = masks[mask]
    if mask == "by row":  # every query sees itself
        given = given | mx.eye(length, dtype=mx.bool_)
    numbers = [given] if mask == "numbers" else []  # which have a gradient, too
    scores = 32 * 2 * 4 * length

    def gradient(function: Any) -> list[mx.array]:
        outputs, gradients = mx.vjp(
            lambda q, k, v, *mask: function(q, k, v, cache=None, scale=0.3, mask=mask[0] if mask else given),
            [queries, keys, values, *numbers],
            [cotangent],
        )
        assert launches(*outputs)["Concatenate"] == (0 if function is scaled_dot_product_attention else 3)
        return [*outputs, *gradients]

    expected = gradient(scaled_dot_product_attention)
    for is_training, training_scores in ((True, scores), (True, None), (False, None)):
        blocks = attention_in_blocks(
            scaled_dot_product_attention,
            lambda is_training=is_training: is_training,
            training_scores=training_scores,
            evaluation_scores=scores,
            most_operations=2 * 8 * scores,
            device="metal",
        )
        evaluated = [blocks(queries, keys, values, cache=None, scale=0.3, mask=given)]
        found = gradient(blocks) if is_training else evaluated
        for one, other in zip(found, expected, strict=is_training):
            np.testing.assert_allclose(np.array(one), np.array(other), rtol=1e-5, atol=2e-6)


def graph_of(model: nn.Module, adaptation: Adaptation, **fields: Any) -> Counter[str]:
    """Operations of a gradient that is not computed."""
    with gradient_computer(model, adaptation, "mlx", **fields) as compute:
        (part,) = compute._layout.parts(collate(rows(), np.arange(3)))
        inputs, layout, keys = compute._arrays(0, part)
        loss, gradient = compute._gradient(0, layout, keys, *inputs)
        return launches(loss, *gradient.values())


LONG = [
    ("llama", "lora", None, "Matmul"),
    ("llama", "lora", 4, "QuantizedMatmul"),
    ("llama", "full", None, "Matmul"),
    ("llama", "dora", 4, "Matmul"),
    ("afm7", "lora", None, "Matmul"),
    ("qwen3_moe", "lora", None, "GatherMM"),
    ("qwen3_moe", "lora", 4, "GatherQMM"),
    ("qwen3_moe", "full", None, "GatherMM"),
    ("deepseek_v3", "lora", None, "GatherMM"),
]


@pytest.mark.parametrize(("family", "kind", "bits", "product"), LONG)
def test_long_products_are_computed_in_parts(family: str, kind: str, bits: int | None, product: str) -> None:
    """As on a Mac, which ends a kernel that runs for seconds; here parts of 60 tokens or so."""
    limit = {"max_operations": 2 * 60 * 32 * 64}
    for recompute in ("none", "cheap"):
        new = make_from(PLAIN) if family == "llama" else new_model(configuration(family))
        model, adaptation = adapted(new, kind, bits=bits, scale=0.03)
        found = computed(model, adaptation, recompute=recompute, **limit)
        whole, parts = (graph_of(model, adaptation, recompute=recompute, **each)[product] for each in ({}, limit))
        assert parts > 2 * whole > 0
        assert_as_mlx_lm(model, found)


def test_no_command_of_metal_runs_for_seconds() -> None:
    """By count, at a quarter of each chip's peak. A buffer ends behind an operation on 50 million values."""
    execution = Execution(device="metal", kernels="mlx", dtype="bfloat16")
    side = math.sqrt(50 * 2**20 / 3)  # of the largest product that does not end a buffer
    before = 2 * side**3
    attention = 4 * 128 * max(execution.max_scores, execution.max_evaluation_scores)
    head = 2 * 8192 * execution.max_logits
    longest_unlimited = 0.0
    for chip in known_chips().values():
        speed = chip.tflops * 1e12 / 4
        # Attention whose scores are held is limited as products are.
        assert (before + max(execution.max_operations, attention, head)) / speed < 2.5, chip.chip
        # Other kernels read and write arrays that fit the memory, once each.
        assert max(chip.memory) / chip.bandwidth < 1.0
        # Two arrays of scores in 16 bits, heads of 128: else attention alone could take so long.
        longest_unlimited = max(longest_unlimited, 2 * 128 * max(chip.memory) * 2**30 / 4 / speed)
    assert longest_unlimited == pytest.approx(5.0, abs=0.1)


WIDE = {**SMALL, "model_type": "llama", "hidden_size": 128, "intermediate_size": 448, "num_hidden_layers": 6}


def held(recompute: str, dtype: mx.Dtype) -> tuple[int, list[np.ndarray]]:
    """Bytes that the blocks of a step hold for its backward pass, and the gradient."""
    model = make_from(WIDE)
    model.update(tree_map(lambda value: value.astype(dtype), model.parameters()))
    model, adaptation = adapted(model, "lora", scale=0.02)
    fields = {"recompute": recompute, "loss_chunk": 64}
    with gradient_computer(model, adaptation, "mlx", **fields) as compute:
        (part,) = compute._layout.parts(collate(rows(), np.arange(3)))
        inputs, layout, keys = compute._arrays(0, part)
        mx.eval(inputs, model.parameters())
        before = settled_memory()
        loss, gradient = compute._gradient(0, layout, keys, *inputs)
        mx.eval(loss)
        mx.synchronize()
        held = mx.get_active_memory() - before
        return held, [np.array(value) for value in gradient.values()]


def test_what_is_cheap_or_in_blocks_is_not_held() -> None:
    """Of three rows of 99 tokens in bfloat16: block inputs, projections and attention, or the inputs alone."""
    tokens, blocks, width = 3 * 99, 6, 2
    none, cheap, whole = (held(recompute, mx.bfloat16)[0] for recompute in ("none", "cheap", "blocks"))
    query, key = 4 * 8, 2 * 8
    kept = blocks * tokens * width * (2 * 128 + 2 * query + 2 * key + 2 * 448)
    hidden = blocks * tokens * width * 128
    beside = 1_200_000  # the gradient of the loss, and copies that MLX makes of the adapter
    assert kept < cheap < kept + beside
    assert hidden < whole < hidden + beside
    assert cheap < 0.7 * none


@pytest.mark.parametrize(("keys", "is_kept"), [(15, False), (16, True)])
def test_attention_is_kept_where_it_is_costly(keys: int, is_kept: bool) -> None:
    """Its result has 32 values a token: a product with a square matrix takes as many operations as 16 keys."""
    queries, values = mx.zeros((1, 4, 4, 8)), mx.zeros((1, 4, keys, 8))
    with recorded() as made:
        kept_attention(scaled_dot_product_attention)(queries, values, values, cache=None, scale=1.0, mask=None)
    assert len(made.arrays) == is_kept


def test_low_rank_layers_compute_in_the_type_of_their_base() -> None:
    """In bfloat16 the gradient is float32's but for rounding, and float32 itself."""
    exact = held("none", mx.float32)[1]
    for recompute in ("none", "cheap", "blocks"):
        found = held(recompute, mx.bfloat16)[1]
        assert {value.dtype for value in found} == {np.dtype(np.float32)}
        error, size = (
            sum(float(np.square(value).sum()) for value in values)
            for values in ([one - other for one, other in zip(found, exact, strict=True)], exact)
        )
        assert error < 0.1**2 * size


@pytest.mark.parametrize(
    "case",
    [
        StepCase(),
        StepCase("wide", adapter="DoRA", rows=1, tokens=16, compiled=True),
    ],
    ids=["2 x 200", "compiled DoRA"],
)
def test_a_step_takes_no_more_memory_than_mlx_lm_s(case: StepCase) -> None:
    """Cases of benchmarks/never_above.py that were above, the update included, beside the weights."""
    peaks = step_peaks(case, steps=1)
    assert max(peaks.values()) == peaks["mlx_lm"], peaks
