"""Rows laid end to end, with chunked losses: the gradients are those of the rows one by one."""

from __future__ import annotations

from collections import Counter
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from mlx_lm.models.base import create_attention_mask, create_causal_mask
from mlx_lm.tuner.trainer import default_loss

from harness.execution import execution_with
from harness.families import configuration, new_model
from harness.family_configurations import VOCABULARY
from helpers.computing import gradient_computer, packs, randomize_adapter, token_loss
from helpers.models import assert_same_gradient, make_model, random_rows
from macft.collective.solo import Solo
from macft.data.batch import collate, pack, pad_pack_to_bucket
from macft.data.formats import Row
from macft.errors import ConfigError
from macft.model.adapters.adapt import adapt
from macft.model.adapters.settings import AdapterConfig
from macft.model.backends.choose import make_backend
from macft.model.backends.cpu.attention import blocks_of
from macft.model.backends.mlx.attention import rows_from_tokens, tokens_from_rows
from macft.model.backends.mlx.cross_entropy import chunked_cross_entropy
from macft.model.packing import PackLayout, attends_under_mask, packed, row_mask
from macft.model.trials.packable import ignores_positions, may_pack
from macft.parallel.shares import DataShard
from macft.training.gradients.gradient import LocalGradient
from macft.training.settings import OptimizerConfig, TrainingConfig, problems
from macft.training.validation import validation_loss


def gradient_of(family: str, data: list[Row], kernels: str, *, packing: bool, dropout: float = 0.0) -> LocalGradient:
    model = make_model(family)
    adaptation = adapt(model, AdapterConfig(rank=4, dropout=dropout), seed=1)
    randomize_adapter(model)
    with gradient_computer(model, adaptation, kernels, packing=packing) as compute:
        return compute(3, [collate(data, np.arange(len(data)))])


def same(one: LocalGradient, other: LocalGradient) -> None:
    assert one.target_tokens == other.target_tokens
    assert one.loss_sum == pytest.approx(other.loss_sum, rel=1e-5)
    for name, value in one.gradient.items():
        expected = np.array(other.gradient[name])
        np.testing.assert_allclose(np.array(value), expected, rtol=1e-3, atol=2e-4 * max(np.abs(expected).max(), 1e-3))


@pytest.mark.parametrize(
    "family", ["llama", "llama-untied", "llama-scaled", "qwen2", "qwen3", "gemma", "granite", "smollm3", "gemma3_text"]
)
def test_packed_rows_have_the_gradient_of_padded_ones(family: str, kernels: str) -> None:
    data = random_rows(7, masked=True)
    assert packs(make_model(family), kernels)
    packed_rows, padded_rows = (
        gradient_of(family, data, kernels, packing=packing, dropout=0.3) for packing in (True, False)
    )
    same(packed_rows, padded_rows)


def beginning_alike(seed: int, *, masked: bool) -> list[Row]:
    """Rows of which most begin as another does, two are the same, and one is the beginning of another."""
    generator = np.random.default_rng(seed)
    start, longer = (generator.integers(1, 97, n) for n in (30, 14))
    bodies = [[], longer, longer, longer[:5], generator.integers(1, 97, 3)]
    tokens = [np.concatenate([start, body, generator.integers(1, 97, 9)]) for body in bodies]
    tokens += [tokens[1], tokens[2][:-4], generator.integers(1, 97, 21)]
    return [Row(row.astype(np.int32), int(generator.integers(0, len(row) - 2)) if masked else 0) for row in tokens]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma"])
def test_what_rows_have_in_common_is_computed_once(family: str, masked: bool, kernels: str) -> None:
    """With the gradient of the rows one by one; what is shared may have targets."""
    data = beginning_alike(4, masked=masked)
    (item,) = pack(collate(data, np.arange(len(data))), None, shared=True)
    assert item.inputs.shape[1] < 0.6 * sum(item.lengths)
    same(*(gradient_of(family, data, kernels, packing=packing) for packing in (True, False)))


def validated(data: list[Row], rank: int, world_size: int, kernels: str, *, packing: bool) -> np.ndarray:
    """A rank's sums of losses and target tokens, (2,), and how many rows it reported as done."""
    reported = [(0, 0)]
    model = make_model("llama")
    with token_loss(model, kernels, packing=packing, evaluation_rows=3) as (loss, execution):
        result = validation_loss(
            model,
            loss,
            execution,
            data,
            Solo(),
            shard=DataShard(rank, world_size),
            progress=lambda *at: reported.append(at),
        )
    done, total = reported[-1]
    assert done == total
    return np.array([result.loss * result.target_tokens, result.target_tokens, done])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("world_size", [1, 2])
def test_validation_of_packs_is_that_of_padded_rows(masked: bool, world_size: int, kernels: str) -> None:
    """Of rows that begin alike and others, and of rows without a target, which fill a whole batch."""
    without = [Row(np.arange(1, 9, dtype=np.int32), 8), *[Row(np.arange(1, 90, dtype=np.int32), 200)] * 6]
    data = [*beginning_alike(4, masked=masked), *without, *random_rows(2, masked=masked)]
    padded, together = (
        sum(validated(data, rank, world_size, kernels, packing=packing) for rank in range(world_size))
        for packing in (False, True)
    )
    assert together == pytest.approx(padded, rel=1e-5)
    assert together[1:].tolist() == [sum(row.target_tokens for row in data), len(data)]


def pack_of(model: nn.Module, *tokens: list[int]) -> np.ndarray:
    data = [Row(np.array(row, np.int32), 0) for row in tokens]
    (item,) = pack(collate(data, np.arange(len(data))), None, shared=True)
    layout = PackLayout(*map(mx.array, (item.paths, item.owners, item.depths)), item.lengths)
    with packed(layout):
        hidden = np.array(model(mx.array(item.inputs)))[0]
    return np.stack([hidden[path] for path in item.paths])


def test_no_row_sees_its_neighbour(kernels: str) -> None:
    """In one pack, what stands in one row changes nothing in the others' logits."""
    model = make_model("llama")
    generator = np.random.default_rng(0)
    first, second, other = (generator.integers(1 + 30 * i, 30 + 30 * i, 90).tolist() for i in range(3))
    begun = first[:50]
    with make_backend(execution_with(kernels, packing=True)).installed(model):
        one = pack_of(model, begun + first, begun + second)
        two = pack_of(model, begun + first, begun + other)
        alone = np.array(model(mx.array([begun + first])[:, :-1]))[0]
    np.testing.assert_array_equal(one[0], two[0])
    assert np.abs(one[1, 50:] - two[1, 50:]).max() > 0.01
    np.testing.assert_allclose(one[0], alone, rtol=1e-4, atol=1e-5)


def rows_beyond(vocabulary: int) -> list[Row]:
    """Seven rows of very different lengths, two of which begin alike; some are longer than any window here."""
    generator = np.random.default_rng(5)
    rows = [generator.integers(1, vocabulary, length).astype(np.int32) for length in (9, 33, 90, 17, 140, 5, 100)]
    rows[4][:40] = rows[2][:40]
    return [Row(tokens, int(generator.integers(0, len(tokens) - 2))) for tokens in rows]


def assert_trains_as_mlx_lm_does(family: str, kernels: str, *, packing: bool, recompute: str = "none") -> None:
    """Loss within 1e-6 of mlx-lm's own, gradient within 1e-4 of its largest value."""
    model, data = new_model(configuration(family)), rows_beyond(VOCABULARY)
    adaptation = adapt(model, AdapterConfig(rank=4), seed=1)
    randomize_adapter(model, scale=0.02)
    batch = collate(data, np.arange(len(data)))
    lengths = mx.array(np.stack([batch.prompt_lengths, batch.lengths - 1], axis=1))
    model.train()
    (loss, count), gradient = nn.value_and_grad(model, default_loss)(model, mx.array(batch.tokens), lengths)
    with gradient_computer(model, adaptation, kernels, packing=packing, recompute=recompute) as compute:
        found = compute(3, [batch])
    assert found.target_tokens == count.item()
    assert found.loss_sum / found.target_tokens == pytest.approx(loss.item(), rel=1e-6)
    expected = {name: value * count for name, value in tree_flatten(gradient)}
    assert_same_gradient(found.gradient, expected, rtol=1e-4)


# Windows in some blocks, plain and behind a wrapper; keys that blocks share; sinks; values narrower than queries.
PECULIAR = ["llama", "gemma3_text", "gemma4", "gpt_oss", "deepseek_v2", "cohere2"]


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("family", PECULIAR)
def test_attention_of_any_family_trains_as_in_mlx_lm(family: str, packing: bool, kernels: str) -> None:
    assert packs(new_model(configuration(family)), kernels)
    assert_trains_as_mlx_lm_does(family, kernels, packing=packing)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma4", "llama4", "ministral3"])
def test_blocks_that_get_and_give_more_than_one_array_can_be_computed_again(family: str, kernels: str) -> None:
    assert_trains_as_mlx_lm_does(family, kernels, packing=False, recompute="blocks")


@pytest.mark.parametrize("family", ["gemma3"])
def test_a_pack_is_right_where_it_packs(family: str, kernels: str) -> None:
    assert packs(new_model(configuration(family)), kernels)
    assert_trains_as_mlx_lm_does(family, kernels, packing=True)


# Attention in chunks, a scale that grows with the position, learned positions, a softmax of its own, state spaces, a
# mask that is more than a mask.
@pytest.mark.parametrize("family", ["llama4", "ministral3", "gpt2", "gemma2", "jamba", "qwen3_next", "deepseek_v3"])
def test_other_models_are_padded(family: str) -> None:
    assert not packs(new_model(configuration(family)), "mlx")


@pytest.mark.parametrize("begins", [64, 16384])
def test_a_scale_that_begins_far_along_a_row_is_no_pack_s(begins: int) -> None:
    """Rows of less tokens never show it."""
    settings = configuration("ministral3")
    scaled = {**settings["rope_parameters"], "original_max_position_embeddings": begins}
    assert not ignores_positions(new_model({**settings, "rope_parameters": scaled}))
    assert ignores_positions(new_model({**settings, "rope_parameters": {**scaled, "llama_4_scaling_beta": 0.0}}))


def test_a_chunk_longer_than_any_trial_is_no_pack_s() -> None:
    settings = configuration("llama4")
    wide = {**settings, "text_config": {**settings["text_config"], "attention_chunk_size": 8192}}
    assert not may_pack(new_model(wide))


def test_masks_of_a_pack_are_those_of_its_rows() -> None:
    """A window that is wider than each row hides nothing, and a narrower one slides over the row."""
    masks = row_mask(create_attention_mask)
    tokens = mx.zeros((1, 50, 4))
    place = mx.zeros((50,), mx.int32)
    with packed(PackLayout(mx.zeros((5, 12), mx.int32), place, place)):
        assert masks(tokens, None) == "causal"
        assert masks(tokens, None, window_size=12) == "causal"
        assert masks(tokens, None, window_size=4).tolist() == create_causal_mask(12, window_size=4).tolist()
    assert masks(tokens, None, window_size=12).shape == (50, 50)


class Peeking(nn.Module):
    """A model of its own kind, whose code needs the values of its tokens, and fails on some."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    @property
    def layers(self) -> list[nn.Module]:
        layers: list[nn.Module] = self.inner.layers
        return layers

    def __call__(self, tokens: mx.array, cache: Any = None) -> Any:
        return {0: self.inner(tokens, cache=cache)}[int(tokens.sum().item())]


def test_whatever_a_model_raises_its_rows_are_padded(kernels: str) -> None:
    model = Peeking(make_model("llama"))
    assert not may_pack(model)
    assert not ignores_positions(model)
    assert not packs(model, kernels)


def test_attention_of_its_own_is_refused(kernels: str) -> None:
    execution = execution_with(kernels, packing=True)
    with (
        pytest.raises(ConfigError, match=r"training\.packing"),
        make_backend(execution).installed(make_model("gemma2")),
    ):
        pass


@settings(max_examples=60, deadline=None)
@given(
    data=st.lists(
        st.tuples(st.lists(st.integers(1, 3), min_size=2, max_size=20), st.integers(0, 20)), min_size=1, max_size=12
    ),
    most=st.one_of(st.none(), st.integers(1, 60)),
    shared=st.booleans(),
    wide=st.booleans(),
)
def test_a_pack_holds_every_row_once(
    data: list[tuple[list[int], int]], most: int | None, shared: bool, wide: bool
) -> None:
    rows = [Row(np.array(tokens, np.int32), prompt) for tokens, prompt in data]
    wanted = {i: row.tokens for i, row in enumerate(rows) if len(row.tokens) > max(row.prompt_length, 1)}
    items = pack(collate(rows, np.arange(len(rows))), most, shared=shared)
    assert sorted(int(row) for item in items for row in item.row_ids) == list(wanted)
    for item in items:
        count, tokens = len(item.lengths), item.inputs.shape[1]
        assert most is None or count == 1 or tokens <= most
        assert shared or tokens == sum(item.lengths)
        item = pad_pack_to_bucket(item) if wide else item
        for path, length, row in zip(item.paths, item.lengths, item.row_ids, strict=False):
            np.testing.assert_array_equal(item.inputs[0, path[:length]], wanted[int(row)][:-1])
            assert shared or set(item.owners[path[:length]]) <= {list(item.row_ids).index(row)}
        where = [item.paths[owner, depth] for owner, depth in zip(item.owners, item.depths, strict=True)]
        np.testing.assert_array_equal(where[:tokens], np.arange(tokens))
        found = Counter(
            (tuple(item.inputs[0, item.paths[owner, : depth + 1]]), int(target))
            for owner, depth, target, weight in zip(
                item.owners[item.positions], item.depths[item.positions], item.targets, item.weights, strict=True
            )
            if weight
        )
        ends = ((rows[int(row)], end) for row in item.row_ids[:count] for end in range(1, len(rows[int(row)].tokens)))
        assert found == Counter(
            (tuple(row.tokens[:end]), int(row.tokens[end])) for row, end in ends if end >= row.prompt_length
        )


@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(1, 2), min_size=2, max_size=30), min_size=1, max_size=5),
    wide=st.booleans(),
    window=st.one_of(st.none(), st.integers(1, 8)),
)
def test_attention_under_a_mask_is_that_row_by_row(rows: list[list[int]], wide: bool, window: int | None) -> None:
    """Values and gradients of each token; MLX's operations choose one or the other by what they cost."""
    data = [Row(np.array(row, np.int32), 0) for row in rows]
    (item,) = pack(collate(data, np.arange(len(data))), None, shared=True)
    item = pad_pack_to_bucket(item) if wide else item
    layout = PackLayout(*map(mx.array, (item.paths, item.owners, item.depths)), item.lengths)
    tokens, longest = item.inputs.shape[1], item.paths.shape[1]
    mask = None if window is None else create_causal_mask(longest, window_size=window)
    mx.random.seed(0)
    inputs = [mx.random.normal((1, heads, tokens, 8)) for heads in (4, 2, 2)]
    wanted = mx.random.normal((1, 4, tokens, 8)) * layout.is_token[:, None]

    def attend(q: mx.array, k: mx.array, v: mx.array, mask: Any) -> mx.array:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, mask=mask)

    def by_rows(*inputs: mx.array) -> mx.array:
        laid_out = (rows_from_tokens(x, layout) for x in inputs)
        return tokens_from_rows(attend(*laid_out, "causal" if mask is None else mask), layout)

    def under_mask(*inputs: mx.array) -> mx.array:
        return attend(*inputs, layout.sees(mask))

    (one, gradients), (other, expected) = (
        mx.vjp(lambda *x, f=f: f(*x) * layout.is_token[:, None], inputs, [wanted]) for f in (under_mask, by_rows)
    )
    for found, right in zip([*one, *gradients], [*other, *expected], strict=True):
        np.testing.assert_allclose(np.array(found), np.array(right), atol=1e-5)


def test_rows_that_share_most_tokens_attend_under_a_mask() -> None:
    """It has fewer scores then; equal rows that share nothing are laid out; one row needs neither."""
    assert attends_under_mask(tokens=4000 + 8 * 40, rows=8, longest=4040, head_dim=64)
    assert attends_under_mask(tokens=300, rows=4, longest=120, head_dim=128)
    assert not attends_under_mask(tokens=16 * 256, rows=16, longest=256, head_dim=128)
    assert attends_under_mask(tokens=4096, rows=1, longest=4096, head_dim=64)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(1, 2), min_size=2, max_size=200), min_size=1, max_size=5),
    most=st.integers(1, 300),
)
def test_the_cpu_attends_to_what_a_row_has(rows: list[list[int]], most: int) -> None:
    """Each block of queries lists the keys of its tokens' rows up to them, and hides the others."""
    data = [Row(np.array(row, np.int32), 0) for row in rows]
    for item in pack(collate(data, np.arange(len(data))), most, shared=True):
        tokens = item.inputs.shape[1]
        seen = np.zeros((tokens, tokens), bool)
        for block in blocks_of([path[:length] for path, length in zip(item.paths, item.lengths, strict=True)]):
            columns = np.arange(tokens)[block.columns]
            assert block.count == len(columns) == len(set(columns))
            visible = np.concatenate([np.ones((block.end - block.start, block.seen), bool), ~block.hidden], axis=1)
            seen[block.start : block.end, columns] = visible
        for token, (owner, depth) in enumerate(zip(item.owners, item.depths, strict=True)):
            assert set(np.flatnonzero(seen[token])) == set(item.paths[owner, : depth + 1])


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
        return 2.0 * chunked_cross_entropy(head, hidden, targets, weights, chunk=chunk or 64)

    expected, reference = mx.value_and_grad(whole)(hidden)
    value, gradient = mx.value_and_grad(parts)(hidden)
    assert value.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-4)
    np.testing.assert_allclose(np.array(gradient), np.array(reference), rtol=1e-3, atol=1e-4)


def test_settings_out_of_range_are_named() -> None:
    config = TrainingConfig(steps=1, packing="yes", loss_chunk=0)
    found = [line.split(":")[0] for line in problems(config, OptimizerConfig())]
    assert found == ["training.packing", "training.loss_chunk"]
