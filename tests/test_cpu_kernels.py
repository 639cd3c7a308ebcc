"""The attention, activation and softmax for CPUs compute what MLX's do, and training layer by layer changes nothing."""

from __future__ import annotations

import gc
from typing import Any

import macft.model.device  # noqa: F401  (loads OpenBLAS before MLX)

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from mlx_lm.models.llama import Model, ModelArgs

from conftest import TINY_CONFIG
from macft import blas
from macft.data.batch import Batch, collate
from macft.data.formats import Row
from macft.model.adapt import adapt
from macft.model.adapter_settings import AdapterConfig
from macft.model.cpu_activations import softmax_parts, swiglu
from macft.model.cpu_attention import causal_attention
from macft.training.gradient import GradientComputer

pytestmark = pytest.mark.skipif(blas.library() is None, reason="these are for a Linux CPU with OpenBLAS")


def close(found: Any, expected: Any, *, within: float = 2e-5, terms: float = 1.0) -> None:
    """Equal but for ``within`` of the largest value, or of ``terms``: the size of what was added and cancelled."""
    ours, theirs = np.array(found), np.array(expected)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=within * max(terms, float(np.abs(theirs).max())))


def longest(vectors: Any) -> float:
    return float(mx.linalg.norm(vectors, axis=-1).max())


@settings(deadline=None, max_examples=25)
@given(
    rows=st.integers(1, 2),
    groups=st.integers(1, 3),
    group=st.integers(1, 3),
    tokens=st.integers(1, 300),
    width=st.sampled_from([8, 64]),
    seed=st.integers(0, 99),
)
def test_attention_and_its_gradient(rows: int, groups: int, group: int, tokens: int, width: int, seed: int) -> None:
    mx.random.seed(seed)
    # Laid out as a model's projections leave them: token by token.
    q, k, v, weights = (
        3 * mx.random.normal((rows, tokens, heads, width)).swapaxes(1, 2)
        for heads in (groups * group, groups, groups, groups * group)
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


def make(*, checkpoint: bool, kind: str, blocks: int) -> tuple[nn.Module, GradientComputer]:
    mx.random.seed(1)
    model = Model(ModelArgs.from_dict({**TINY_CONFIG, "num_hidden_layers": 3}))
    model.freeze()
    adaptation = adapt(model, AdapterConfig(type=kind, num_layers=blocks), seed=0)
    for name, value in tree_flatten(model.trainable_parameters()):
        if name.endswith("lora_b"):
            value[:] = 0.02 * mx.random.normal(value.shape)
    return model, GradientComputer(model, adaptation.dropout_keys, seed=0, checkpoint_blocks=checkpoint)


def batch() -> Batch:
    lengths = (150, 90, 20)
    rows = [Row(np.random.default_rng(n).integers(0, 4096, n).tolist(), n // 4) for n in lengths]
    return collate(rows, np.arange(len(rows)))


@pytest.mark.parametrize(("kind", "blocks"), [("lora", 3), ("lora", 1), ("dora", 2), ("full", 2)])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_layer_by_layer_the_gradient_is_mlx_s(kind: str, blocks: int, checkpoint: bool) -> None:
    model, compute = make(checkpoint=checkpoint, kind=kind, blocks=blocks)
    rows = batch()
    found = compute(0, [rows])
    assert compute._eager is not None

    def whole() -> Any:
        total = mx.zeros(())
        for number, length in enumerate(rows.lengths):
            tokens = mx.array(rows.tokens[number : number + 1, :length])
            losses = nn.losses.cross_entropy(model(tokens[:, :-1])[0], tokens[0, 1:])
            total = total + losses[max(int(rows.prompt_lengths[number]), 1) - 1 :].sum()
        return total

    loss, gradient = nn.value_and_grad(model, whole)()
    assert found.loss_sum == pytest.approx(loss.item(), rel=1e-5)
    expected = dict(tree_flatten(gradient))
    assert expected.keys() == found.gradient.keys()
    for name, value in expected.items():
        close(found.gradient[name], value, within=1e-4)


def test_nothing_of_a_step_is_held_after_it() -> None:
    _, compute = make(checkpoint=False, kind="lora", blocks=3)
    rows = batch()

    def held() -> int:
        gradient = compute(0, [rows]).gradient
        mx.eval(list(gradient.values()))
        del gradient
        return int(mx.get_active_memory())

    gc.disable()  # nothing may need it
    try:
        first = held()
        assert max(held() for _ in range(4)) <= first + 100_000
    finally:
        gc.enable()
