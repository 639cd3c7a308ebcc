"""Rows laid end to end, with chunked losses: the gradients are those of the rows one by one."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from macft.data.batch import collate, pack
from macft.data.formats import Row
from macft.errors import ConfigError
from macft.model.adapt import adapt
from macft.model.adapter_settings import AdapterConfig
from macft.model.packing import enable_packing, packed
from macft.training.cross_entropy import chunked_cross_entropy
from macft.training.gradient import GradientComputer, LocalGradient
from macft.training.settings import OptimizerConfig, TrainingConfig, problems
from test_loss import make, rows


def gradient_of(family: str, packing: str, data: list[Row], *, dropout: float = 0.0) -> tuple[bool, LocalGradient]:
    model = make(family)
    adaptation = adapt(model, AdapterConfig(rank=4, dropout=dropout), seed=1)
    mx.random.seed(5)
    values = [(name, mx.random.normal(value.shape) * 0.1) for name, value in tree_flatten(model.trainable_parameters())]
    model.load_weights(values, strict=False)
    compute = GradientComputer(model, adaptation.dropout_keys, seed=0, checkpoint_blocks=False, packing=packing)
    return compute.packs, compute(3, [collate(data, np.arange(len(data)))], 1)


def same(one: LocalGradient, other: LocalGradient) -> None:
    assert one.target_tokens == other.target_tokens
    assert one.loss_sum == pytest.approx(other.loss_sum, rel=1e-5)
    for name, value in one.gradient.items():
        expected = np.array(other.gradient[name])
        np.testing.assert_allclose(np.array(value), expected, rtol=1e-3, atol=2e-4 * max(np.abs(expected).max(), 1e-3))


@pytest.mark.parametrize("family", ["llama", "llama-untied", "qwen2", "qwen3", "gemma", "granite"])
def test_packed_rows_have_the_gradient_of_padded_ones(family: str) -> None:
    data = rows(7, masked=True)
    packs, together = gradient_of(family, "auto", data, dropout=0.3)
    assert packs
    same(together, gradient_of(family, "false", data, dropout=0.3)[1])


def test_no_row_sees_its_neighbour() -> None:
    """In one pack, what stands in one row changes nothing in the others' hidden states."""
    model = make("llama")
    assert enable_packing(model)
    first, second, other = (
        mx.array(np.random.default_rng(i).integers(1, 97, (1, n))) for i, n in ((0, 7), (1, 9), (2, 7))
    )
    with packed((7, 9)):
        one = np.array(model(mx.concatenate([first, second], axis=1)))
        two = np.array(model(mx.concatenate([other, second], axis=1)))
    np.testing.assert_array_equal(one[:, 7:], two[:, 7:])
    assert np.abs(one[:, :7] - two[:, :7]).max() > 0.01
    np.testing.assert_allclose(one[:, 7:], np.array(model(second)), rtol=1e-4, atol=1e-5)


def test_a_sliding_window_is_padded_instead() -> None:
    data = rows(1, masked=False)
    assert not gradient_of("gemma3_text", "auto", data)[0]
    with pytest.raises(ConfigError, match=r"training\.packing"):
        gradient_of("gemma3_text", "true", data)


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 40), min_size=1, max_size=12),
    most=st.one_of(st.none(), st.integers(1, 60)),
)
def test_a_pack_holds_every_row_once(lengths: list[int], most: int | None) -> None:
    data = [Row(np.arange(100 * i, 100 * i + n, dtype=np.int32), prompt_length=n // 2) for i, n in enumerate(lengths)]
    packs = pack(collate(data, np.arange(len(data))), most)
    assert sorted(int(row) for item in packs for row in item.row_ids) == list(range(len(data)))
    for item in packs:
        assert most is None or len(item.lengths) == 1 or item.inputs.shape[1] <= most
        start = 0
        for row, length in zip(item.row_ids, item.lengths, strict=True):
            np.testing.assert_array_equal(item.inputs[0, start : start + length], data[row].tokens[:-1])
            start += length
        np.testing.assert_array_equal(item.inputs[0, item.positions] + 1, item.targets)
    assert sum(len(item.targets) for item in packs) == sum(n - max(n // 2, 1) for n in lengths)


@settings(max_examples=15, deadline=None)
@given(
    count=st.integers(1, 50), chunk=st.one_of(st.none(), st.integers(1, 20)), cap=st.booleans(), seed=st.integers(0, 99)
)
def test_chunked_loss_is_the_whole_one(count: int, chunk: int | None, cap: bool, seed: int) -> None:
    generator = np.random.default_rng(seed)
    hidden = mx.array(generator.normal(size=(count, 8)).astype(np.float32))
    table = mx.array(generator.normal(size=(8, 60)).astype(np.float32)) * 3
    targets = mx.array(generator.integers(0, 60, count).astype(np.int32))
    weights = mx.array(generator.integers(0, 2, count).astype(np.float32))

    def head(hidden: Any) -> Any:
        logits = hidden @ table
        return mx.tanh(logits / 5.0) * 5.0 if cap else logits

    def whole(hidden: Any) -> Any:
        return 2.0 * (nn.losses.cross_entropy(head(hidden[None])[0], targets) * weights).sum()

    def parts(hidden: Any) -> Any:
        return 2.0 * chunked_cross_entropy(head, hidden, targets, weights, wanted_chunk=chunk)

    expected, reference = mx.value_and_grad(whole)(hidden)
    value, gradient = mx.value_and_grad(parts)(hidden)
    assert value.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-4)
    np.testing.assert_allclose(np.array(gradient), np.array(reference), rtol=1e-3, atol=1e-4)


def test_settings_out_of_range_are_named() -> None:
    config = TrainingConfig(steps=1, packing="yes", loss_chunk=0)
    found = [line.split(":")[0] for line in problems(config, OptimizerConfig())]
    assert found == ["training.packing", "training.loss_chunk"]
