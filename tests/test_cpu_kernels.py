"""The attention, activation and softmax for CPUs compute what MLX's do, and training layer by layer changes nothing."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from mlx_lm.models.base import create_causal_mask, scaled_dot_product_attention
from mlx_lm.models.cache import KVCache
from mlx_lm.models.llama import Model, ModelArgs
from mlx_lm.models.rope_utils import initialize_rope
from mlx_lm.tuner.lora import LoRALinear

from harness.tiny_model import TINY_CONFIG
from helpers.computing import gradient_computer, settled_memory
from macft.data.batch import Batch, collate
from macft.data.formats import Row
from macft.device import blas
from macft.model.adapters.adapt import adapt
from macft.model.adapters.settings import AdapterConfig
from macft.model.backends.cpu.activations import softmax_parts, swiglu
from macft.model.backends.cpu.attention import causal_attention, fast_attention
from macft.model.backends.cpu.cross_entropy import blockwise_cross_entropy
from macft.model.backends.cpu.layers import kernel_for
from macft.model.packing import PackedRope, PackLayout, packed
from macft.training.gradients.gradient import GradientComputer

pytestmark = pytest.mark.skipif(blas.library() is None, reason="these are for a Linux CPU with OpenBLAS")


def close(found: Any, expected: Any, *, within: float = 2e-5, terms: float = 1.0) -> None:
    """Equal but for ``within`` of the largest value, or of ``terms``: the size of what was added and cancelled."""
    ours, theirs = np.array(found), np.array(expected)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=within * max(terms, float(np.abs(theirs).max())))


def longest(vectors: Any) -> float:
    return float(mx.linalg.norm(vectors, axis=-1).max())


@pytest.mark.slow
@settings(deadline=None, max_examples=25)
@given(
    rows=st.integers(1, 2),
    groups=st.integers(1, 3),
    group=st.integers(1, 3),
    tokens=st.integers(1, 300),
    width=st.sampled_from([8, 64]),
    value_width=st.sampled_from([8, 24]),
    seed=st.integers(0, 99),
)
def test_attention_and_its_gradient(
    rows: int, groups: int, group: int, tokens: int, width: int, value_width: int, seed: int
) -> None:
    mx.random.seed(seed)
    # Laid out as a model's projections leave them: token by token.
    heads = groups * group
    q, k, v, weights = (
        3 * mx.random.normal((rows, tokens, *shape)).swapaxes(1, 2)
        for shape in ((heads, width), (groups, width), (groups, value_width), (heads, value_width))
    )

    def ours(q: Any, k: Any, v: Any) -> Any:
        return causal_attention(q, k, v, 0.3)

    def theirs(q: Any, k: Any, v: Any) -> Any:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, mask="causal")

    close(ours(q, k, v), theirs(q, k, v))
    found, expected = (
        mx.grad(lambda q, k, v, attend=attend: (attend(q, k, v) * weights).sum(), argnums=(0, 1, 2))(q, k, v)
        for attend in (ours, theirs)
    )
    # What rounding alone may do: to a score, hence to its weight, and to the sums whose difference its gradient is.
    score = 0.3 * longest(q) * longest(k)
    weight = longest(weights) * (1 + score)
    slope = 0.05 * weight * longest(v)
    terms = (slope * 0.3 * longest(k), slope * 0.3 * longest(q), weight)
    for one, other, size in zip(found, expected, terms, strict=True):
        close(one, other, within=2e-7, terms=size)


CALLS: dict[str, dict[str, Any]] = {
    "causal": {"mask": "causal"},
    "sinks": {"mask": "causal", "sinks": mx.array([0.5, -1.0, 2.0, 0.0, 1.0, 3.0])},
    "no sinks": {"mask": "causal", "sinks": None},
    "window": {"mask": create_causal_mask(80, window_size=16)},
    "added to scores": {"mask": mx.random.normal((1, 1, 80, 80), key=mx.random.key(3))},
    "no mask": {"mask": None},
}


@pytest.mark.parametrize("value_width", [8, 12])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("call", CALLS)
def test_any_call_of_attention_is_mlx_s(call: str, kv_heads: int, value_width: int) -> None:
    """With the gradient: masks, sinks, and values that are not as wide as queries."""
    mx.random.seed(2)
    shapes = ((6, 8), (kv_heads, 8), (kv_heads, value_width), (6, value_width))
    *inputs, weights = (mx.random.normal((2, heads, 80, width)) for heads, width in shapes)
    named = {"cache": None, "scale": 0.3, **CALLS[call]}

    def computed(attention: Any) -> Any:
        return mx.value_and_grad(lambda *qkv: (attention(*qkv, **named) * weights).sum(), argnums=(0, 1, 2))(*inputs)

    (value, gradients), (expected, references) = map(
        computed, (fast_attention(scaled_dot_product_attention), scaled_dot_product_attention)
    )
    close(value, expected, terms=100.0)
    for found, reference in zip(gradients, references, strict=True):
        close(found, reference)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_types_keep_mlx_s_attention(dtype: Any) -> None:
    mx.random.seed(4)
    q, k, v = (mx.random.normal((1, 2, 80, 8)).astype(dtype) for _ in range(3))
    named = {"cache": None, "scale": 0.3, "mask": "causal"}
    found = fast_attention(scaled_dot_product_attention)(q, k, v, **named)
    assert found.dtype == dtype
    assert mx.array_equal(found, scaled_dot_product_attention(q, k, v, **named))


def test_one_query_behind_a_cache_is_mlx_s() -> None:
    mx.random.seed(5)
    (q, k, v), cache = (mx.random.normal((1, 2, tokens, 8)) for tokens in (1, 80, 80)), KVCache()
    found = fast_attention(scaled_dot_product_attention)(q, k, v, cache=cache, scale=0.3, mask=None)
    assert mx.array_equal(found, scaled_dot_product_attention(q, k, v, cache=cache, scale=0.3, mask=None))


@pytest.mark.parametrize("count", [1, 1000, 400_000])
def test_swiglu_and_its_gradient(count: int) -> None:
    mx.random.seed(count)
    gate, x, weight = 30 * mx.random.normal((count,)), mx.random.normal((count,)), mx.random.normal((count,))
    gate[0] = -200.0  # exp overflows, and the result is still 0
    close(swiglu(gate, x), nn.silu(gate) * x)
    found = mx.grad(lambda g, x: (swiglu(g, x) * weight).sum(), argnums=(0, 1))(gate, x)
    expected = mx.grad(lambda g, x: (nn.silu(g) * x * weight).sum(), argnums=(0, 1))(gate, x)
    for one, other in zip(found, expected, strict=True):
        close(one, other)


def test_parts_of_the_softmax() -> None:
    logits = 50 * mx.random.normal((70, 5000))
    powers, sums = softmax_parts(logits)
    close(powers / sums, mx.softmax(logits, axis=-1))


@pytest.mark.slow
@settings(deadline=None, max_examples=30)
@given(
    count=st.integers(1, 700),
    vocabulary=st.integers(2, 3000),
    certain=st.sampled_from([0.0, 1.0, 60.0]),
    at_once=st.sampled_from([None, 100]),
    seed=st.integers(0, 99),
)
@example(count=1, vocabulary=966, certain=60.0, at_once=None, seed=0)
def test_cross_entropy_and_its_gradient(
    count: int, vocabulary: int, certain: float, at_once: int | None, seed: int
) -> None:
    """``certain``: how far a target's logit stands out, up to where all else is nothing in float32."""
    mx.random.seed(seed)
    hidden, head = mx.random.normal((count, 24)), 0.3 * mx.random.normal((vocabulary, 24))
    targets = mx.random.randint(0, vocabulary, (count,))
    hidden = hidden + certain * head[targets]
    weights = (mx.random.uniform(shape=(count,)) < 0.8).astype(mx.float32)

    def ours(hidden: Any, *, with_gradient: bool = True) -> Any:
        return blockwise_cross_entropy(head, hidden, targets, weights, chunk=at_once, with_gradient=with_gradient)

    exact_logits = np.array(hidden, np.float64) @ np.array(head, np.float64).T
    # What float32 can hold of a logit is what a loss can be right to.
    rounding = max(2e-6, float(np.finfo(np.float32).eps * np.abs(exact_logits).max()))

    def exact() -> tuple[float, Any]:
        logits = exact_logits - exact_logits.max(axis=1, keepdims=True)
        powers = np.exp(logits)
        rows, words, counted = np.arange(count), np.array(targets), np.array(weights, np.float64)
        loss = ((np.log(powers.sum(axis=1)) - logits[rows, words]) * counted).sum()
        powers /= powers.sum(axis=1, keepdims=True)
        powers[rows, words] -= 1
        return float(loss), (powers * counted[:, None]) @ np.array(head, np.float64)

    loss, gradient = mx.value_and_grad(ours)(hidden)
    expected_loss, expected = exact()
    assert loss.item() == pytest.approx(expected_loss, rel=2e-5, abs=rounding * count)
    assert ours(hidden, with_gradient=False).item() == loss.item()
    np.testing.assert_allclose(np.array(gradient), expected, rtol=0, atol=2e-5)
    close(mx.grad(lambda hidden: 3 * ours(hidden))(hidden), 3 * gradient)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_no_number(bad: float) -> None:
    hidden = mx.ones((3, 8))
    hidden[1, 2] = bad
    value = blockwise_cross_entropy(
        mx.ones((20, 8)), hidden, mx.array([1, 2, 3]), mx.ones(3), chunk=None, with_gradient=True
    )
    assert not np.isfinite(value.item())


@settings(deadline=None, max_examples=40)
@given(
    kind=st.sampled_from(["linear", "bias", "lora", "lora with bias", "norm"]),
    shape=st.sampled_from([(1, 1), (1, 37), (3, 20)]),
    seed=st.integers(0, 99),
)
def test_layers_and_their_gradients(kind: str, shape: tuple[int, int], seed: int) -> None:
    mx.random.seed(seed)
    layer: Any = nn.RMSNorm(24) if kind == "norm" else nn.Linear(24, 40, bias="bias" in kind)
    layer.weight = mx.random.normal(layer.weight.shape)
    if "lora" in kind:
        layer = LoRALinear.from_base(layer, r=4, scale=3.0)
        layer.lora_b = mx.random.normal(layer.lora_b.shape)
        layer.linear.freeze()
    else:
        layer.freeze()
    same_layer(layer, mx.random.normal((*shape, 24)))


def same_layer(layer: Any, x: Any) -> None:
    """``layer`` by its kernel and by MLX: values, and gradients by input and trained parameters."""
    names = [name for name, _ in tree_flatten(layer.trainable_parameters())]
    kernel = kernel_for(layer, names, x)
    assert kernel is not None
    values = [layer[name] for name in names]
    cotangent = mx.random.normal(layer(x).shape)

    def call(x: Any, *values: Any) -> Any:
        layer.update(dict(zip(names, values, strict=True)))
        return layer(x)

    (result,), gradients = mx.vjp(call, [x, *values], [cotangent])
    close(kernel.forward(x, *values), result)
    found = kernel.backward(cotangent, x, *values)
    assert len(found) == len(gradients)
    for one, other in zip(found, gradients, strict=True):
        close(one, other)


@pytest.mark.parametrize("rope", ["plain", "llama3", "traditional", "partial"])
def test_rotary_embeddings_of_a_pack(rope: str) -> None:
    """Those that pair each element with the one half a width on have a kernel, the others are left to MLX."""
    inner: Any = nn.RoPE(4 if rope == "partial" else 8, traditional=rope == "traditional", base=100.0)
    if rope == "llama3":
        scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3"}
        inner = initialize_rope(8, 100.0, False, {**scaling, "original_max_position_embeddings": 64}, 128)
    layer = PackedRope(inner)
    mx.random.seed(0)
    x = mx.random.normal((1, 5, 3, 8)).swapaxes(1, 2)
    layout = PackLayout(mx.array([[0, 1, 2], [0, 3, 4]]), mx.array([0, 0, 0, 1, 1]), mx.array([0, 1, 2, 1, 2]), (3, 3))
    with packed(layout):
        if rope in ("plain", "llama3"):
            same_layer(layer, x)
        else:
            assert kernel_for(layer, [], x) is None
    assert kernel_for(layer, [], x) is None  # outside of packs


def test_layers_that_compute_more_are_left_to_mlx() -> None:
    x = mx.zeros((1, 4, 64))
    linear = nn.Linear(64, 64)
    assert kernel_for(linear, ["weight", "bias"], x) is None
    assert kernel_for(linear.to_quantized(), [], x) is None
    assert kernel_for(LoRALinear.from_base(linear, dropout=0.1), ["lora_a", "lora_b"], x) is None
    assert kernel_for(LoRALinear.from_base(linear.to_quantized()), ["lora_a", "lora_b"], x) is None
    assert kernel_for(nn.RMSNorm(64), ["weight"], x) is None


@contextmanager
def computer(*, recompute: str, kind: str, blocks: int, kernels: str = "cpu") -> Iterator[tuple[Any, GradientComputer]]:
    mx.random.seed(1)
    model = Model(ModelArgs.from_dict({**TINY_CONFIG, "num_hidden_layers": 3}))
    model.freeze()
    adaptation = adapt(model, AdapterConfig(type=kind, num_layers=blocks), seed=0)
    for name, value in tree_flatten(model.trainable_parameters()):
        if name.endswith("lora_b"):
            value[:] = 0.02 * mx.random.normal(value.shape)
    with gradient_computer(model, adaptation, kernels, packing=True, recompute=recompute) as compute:
        yield model, compute


def batch() -> Batch:
    lengths = (150, 90, 20)
    rows = [Row(np.random.default_rng(n).integers(0, 4096, n).tolist(), n // 4) for n in lengths]
    return collate(rows, np.arange(len(rows)))


@pytest.mark.parametrize(("kind", "blocks"), [("lora", 3), ("lora", 1), ("dora", 2), ("full", 2)])
@pytest.mark.parametrize("recompute", ["none", "blocks"])
def test_the_gradient_of_a_pack_is_that_of_mlx_row_by_row(kind: str, blocks: int, recompute: str, kernels: str) -> None:
    rows = batch()
    with computer(recompute=recompute, kind=kind, blocks=blocks, kernels=kernels) as (model, compute):
        found = compute(0, [rows])

    def whole() -> Any:
        total = mx.zeros(())
        for number, length in enumerate(rows.lengths):
            tokens = mx.array(rows.tokens[number : number + 1, :length])
            losses = nn.losses.cross_entropy(model(tokens[:, :-1])[0], tokens[0, 1:])
            total = total + losses[max(int(rows.prompt_lengths[number]), 1) - 1 :].sum()
        return total

    loss, gradient = nn.value_and_grad(model, whole)()  # the model is out of the backend, so this is MLX's own
    assert found.loss_sum == pytest.approx(loss.item(), rel=1e-5)
    expected = dict(tree_flatten(gradient))
    assert expected.keys() == found.gradient.keys()
    for name, value in expected.items():
        close(found.gradient[name], value, within=1e-4)


@pytest.mark.slow
def test_nothing_of_a_step_is_held_after_it() -> None:
    rows = batch()
    with computer(recompute="none", kind="lora", blocks=3) as (_, compute):

        def held() -> int:
            gradient = compute(0, [rows]).gradient
            mx.eval(list(gradient.values()))
            del gradient
            return int(mx.get_active_memory())

        settled_memory()
        gc.disable()  # nothing may need it
        try:
            first = held()
            assert max(held() for _ in range(4)) <= first + 100_000
        finally:
            gc.enable()
