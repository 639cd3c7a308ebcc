"""Stages of a pipeline, each in a thread with a ring of real sockets: together they compute what one node does."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from numpy.typing import NDArray

from harness.execution import execution_with
from harness.families import build
from helpers.computing import randomize_adapter
from helpers.rings import local_listeners, run_ranks
from macft.collective.base import Collective
from macft.collective.settings import CollectiveConfig
from macft.collective.solo import Solo
from macft.data.batch import micro_batches
from macft.data.formats import Row
from macft.model.adapters.adapt import adapt
from macft.model.adapters.settings import AdapterConfig
from macft.model.backends.choose import make_backend
from macft.model.blocks.ends import AFTER, BEFORE
from macft.model.confirm import confirm
from macft.model.load import load
from macft.model.settings import ModelConfig
from macft.parallel.shares import batches_of_shard, rows_of_shard
from macft.parallel.stage_layout import Stage, StageLayout, even_layout
from macft.parallel.stage_places import StagePlace, StagePlaces
from macft.training.batch_layout import BatchLayout
from macft.training.gradients.exact_sums import ExactGradient
from macft.training.gradients.pipeline_schedule import Pass, holding, one_forward_one_backward
from macft.training.gradients.step_gradient import make_step_gradient

BLOCKS = 5
EXACT = ModelConfig(precision="float32", quantization="none")
ADAPTERS = {
    "lora": AdapterConfig(),
    "last three, dropout": AdapterConfig(num_layers=3, dropout=0.3),
    "dora": AdapterConfig(type="dora"),
    "last block": AdapterConfig(num_layers=1),
}
Numbers = dict[str, Any]
_PREPARING = threading.Lock()
"""One thread at a time: Python 3.11's parser, which reads the code of models, is not for several."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of five blocks, its embedding tied to its head."""
    return build("llama", tmp_path_factory.mktemp("llama"), num_hidden_layers=BLOCKS, tie_word_embeddings=True)


def rows() -> list[Row]:
    generator = np.random.default_rng(0)
    lengths = (9, 33, 17, 5, 20, 21, 12, 8)
    return [Row(generator.integers(1, 97, length).astype(np.int32), prompt_length=3) for length in lengths]


def layout_of(*pipelines: Sequence[int], ranks: Sequence[int] = ()) -> StageLayout:
    """Stages of so many blocks each, of ``ranks``, or of all in their order."""
    rest, made = iter(ranks or range(100)), []
    for counts in pipelines:
        ends = np.cumsum([0, *counts]).tolist()
        made.append(tuple(Stage(next(rest), *ends[place : place + 2]) for place in range(len(counts))))
    return StageLayout(tuple(made))


def computed(
    collective: Collective,
    layout: StageLayout,
    folder: Path,
    kernels: str,
    adapter: AdapterConfig,
    *,
    model: ModelConfig = EXACT,
    capacity: int = BLOCKS,
    keep: bool = False,
    ahead: Mapping[int, int] = MappingProxyType({}),
    sizes: Sequence[int | None] = (2, 1),
    packing: bool = False,
    exact: bool = False,
) -> list[Numbers]:
    """What one rank has after the exchange: loss, counts and gradient of a step for each of ``sizes``; then losses.

    ``ahead``: hidden states that there is room for, by rank. ``exact``: micro-batches are fixed, whole ones are dealt
    to pipelines, and their sums are exact.
    """
    places = StagePlaces(collective, lambda _: layout)
    places.agree()
    execution = execution_with(kernels, packing=packing, dropout=adapter.dropout > 0)
    borders = ahead.get(collective.rank, 100)
    execution = replace(
        execution, dtype=model.precision, activation_capacity=100 if keep else 0, border_capacity=borders
    )
    execution = (replace(execution, pack_tokens=40) if execution.packing else execution).pipelined(
        capacity, tuple(layout.blocks_of(collective.rank))
    )
    shard = places.shard([1.0] * collective.world_size)
    mine = rows_of_shard(shard, [row.tokens for row in rows()], shared=execution.shared_prefixes)
    found = []
    with ExitStack() as installed:
        with _PREPARING:
            loaded = load(model, folder, execution)
            adaptation = adapt(loaded.model, adapter, seed=0, streamed=loaded.streamed)
            trained = tree_flatten(loaded.model.trainable_parameters())
            randomize_adapter(loaded.model)
            loaded.model.load_weights([(name, value) for name, value in trained if name[-2:] == ".m"], strict=False)
            mx.eval(loaded.model.trainable_parameters())
            backend = make_backend(execution)
            installed.enter_context(backend.installed(loaded.model))
            keys, streamed = adaptation.dropout_keys, loaded.streamed
            assert streamed is not None
            compute = make_step_gradient(
                loaded.model,
                backend,
                execution,
                keys,
                streamed,
                seed=1,
                bucket_bytes=4_000_000,
                places=places,
                deterministic=exact,
            )
        for step, size in enumerate(sizes):
            if exact:
                batches = batches_of_shard(shard, micro_batches(rows(), np.arange(len(rows())), size))
            else:
                batches = micro_batches([rows()[i] for i in mine], mine, size)
            local = compute(step, batches)
            mx.eval(local.gradient)
            tokens = 0 if local.is_counted_elsewhere else local.tokens
            counts = np.array([local.loss_sum, local.target_tokens, tokens])
            sums = local.halves if isinstance(local, ExactGradient) else local.gradient
            gradient = {name: np.array(value) for name, value in sums.items()}
            collective.all_reduce([counts, *gradient.values()])
            found.append({"counts": counts, **gradient})
        if exact:
            return found
        loaded.model.eval()
        batches = micro_batches([rows()[i] for i in mine], mine, 4)
        validation = BatchLayout.for_validation(execution)
        parts = [list(validation.parts(batch)) for batch in batches]
        losses = list(compute.loss.of_batches(parts))
        wishes, is_first = iter([False]), places.own is None or places.own.before is None
        cut = list(compute.loss.of_batches(parts, lambda: is_first and next(wishes, True)))
        assert len(cut) <= 1  # a stop was requested at the first stage, and the others learn it
        total = np.array([float(sum(sum(each) for each in losses))])
        collective.all_reduce([total])
        found.append({"validation": total})
        place = places.own
        if place is not None:
            assert streamed.held_blocks <= set(place.stage.blocks)  # nothing but its own
            assert streamed.ends == place.ends
            assert_has_no_other_end(loaded.model, place)
    return found


def assert_has_no_other_end(model: Any, place: StagePlace) -> None:
    """The embedding is in memory on the first stage only, or on the last one too where it is the head."""
    head = model.model.embed_tokens if "lm_head" not in model else model.lm_head
    needed = {id(head): place.after is None}
    needed[id(model.model.embed_tokens)] = place.before is None or needed.get(id(model.model.embed_tokens), False)
    for module in (head, model.model.embed_tokens):
        assert bool(mx.isnan(module.weight[0, 0]).item()) != needed[id(module)]


def one_node(folder: Path, kernels: str, adapter: AdapterConfig, **more: Any) -> list[Numbers]:
    return computed(Solo(), layout_of([BLOCKS]), folder, kernels, adapter, **more)


def in_stages(layout: StageLayout, world_size: int, *arguments: Any, encrypted: bool = False, **more: Any) -> list[Any]:
    listeners = local_listeners(world_size, CollectiveConfig(timeout=60.0), encrypted=encrypted)
    return run_ranks(listeners, lambda ring: computed(ring, layout, *arguments, **more))


def assert_same(found: list[Numbers], expected: list[Numbers], check: Callable[..., None]) -> None:
    assert len(found) == len(expected)
    for mine, other in zip(found, expected, strict=True):
        assert mine.keys() == other.keys()
        for name, value in other.items():
            check(mine[name], value, err_msg=name)


def close(found: NDArray[Any], expected: NDArray[Any], err_msg: str) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max(), err_msg=err_msg)


@pytest.mark.parametrize("name", ADAPTERS)
def test_stages_have_the_bits_of_one_node(folder: Path, kernels: str, name: str) -> None:
    """With accumulation; every rank has the whole gradient. Three uneven stages, over encrypted streams."""
    adapter, packing = ADAPTERS[name], name in ("last three, dropout", "dora")
    expected = one_node(folder, kernels, adapter, packing=packing)
    for found in in_stages(layout_of([1, 3, 1]), 3, folder, kernels, adapter, packing=packing, encrypted=True):
        assert_same(found, expected, np.testing.assert_array_equal)


def test_embedding_and_head_are_apart(tmp_path: Path, kernels: str) -> None:
    folder = build("llama", tmp_path / "apart", num_hidden_layers=BLOCKS, tie_word_embeddings=False)
    expected = one_node(folder, kernels, AdapterConfig())
    for found in in_stages(layout_of([1, 3, 1]), 3, folder, kernels, AdapterConfig()):
        assert_same(found, expected, np.testing.assert_array_equal)


@pytest.mark.parametrize(("counts", "ranks"), [([2, 3], [1, 0]), ([1, 2, 1, 1], [0, 1, 2, 3])], ids=str)
def test_other_cuts_have_the_same_bits(folder: Path, counts: list[int], ranks: list[int]) -> None:
    """In another order of the ranks too, and where rank 0 has memory for fewer micro-batches than the others."""
    expected, layout = one_node(folder, "mlx", AdapterConfig(dropout=0.2)), layout_of(counts, ranks=ranks)
    for found in in_stages(layout, len(counts), folder, "mlx", AdapterConfig(dropout=0.2), ahead={0: 0}):
        assert_same(found, expected, np.testing.assert_array_equal)


def test_two_pipelines_of_two_and_a_rank_that_is_left_out(folder: Path) -> None:
    """Rows are dealt to pipelines, so sums are made in another order."""
    expected = one_node(folder, "mlx", AdapterConfig())
    layout = layout_of([2, 3], [4, 1], ranks=[3, 0, 4, 1])
    for found in in_stages(layout, 5, folder, "mlx", AdapterConfig()):
        assert_same(found, expected, close)


def test_exact_sums_are_those_of_one_node_over_any_pipelines(folder: Path) -> None:
    """Micro-batches of one row and of two, in one pack or several; stages that keep activations or compute again."""
    adapter = AdapterConfig(num_layers=3, dropout=0.3)
    expected = one_node(folder, "mlx", adapter, packing=True, exact=True)
    for layout, ranks, keep in (
        (layout_of([2, 3]), 2, True),
        (layout_of([2, 3], [4, 1], ranks=[3, 0, 4, 1]), 5, False),
        (layout_of([5], [1, 4]), 3, False),
    ):
        for found in in_stages(layout, ranks, folder, "mlx", adapter, packing=True, keep=keep, exact=True):
            assert_same(found, expected, np.testing.assert_array_equal)


def test_stages_that_hold_fewer_blocks_than_they_compute(folder: Path) -> None:
    expected = one_node(folder, "mlx", AdapterConfig())
    for found in in_stages(layout_of([2, 3]), 2, folder, "mlx", AdapterConfig(), capacity=1, ahead={0: 0, 1: 0}):
        assert_same(found, expected, np.testing.assert_array_equal)


@pytest.mark.parametrize("name", ADAPTERS)
def test_activations_that_are_kept_give_the_same_bits(folder: Path, name: str) -> None:
    """Without a second forward pass, where the backend is not eager."""
    adapter, packing = ADAPTERS[name], name in ("last three, dropout", "dora")
    expected = one_node(folder, "mlx", adapter, packing=packing)
    for found in in_stages(layout_of([2, 3]), 2, folder, "mlx", adapter, packing=packing, keep=True):
        assert_same(found, expected, np.testing.assert_array_equal)


def test_trials_before_a_run_read_no_block(folder: Path) -> None:
    """They are of the model's code, and a stage has no use for the weights of others."""
    execution = execution_with("mlx").pipelined(BLOCKS)
    loaded = load(EXACT, folder, execution)
    assert loaded.streamed is not None

    def refuse(number: int) -> list[mx.array]:
        raise AssertionError(f"block {number} is read")

    read = loaded.streamed.replace_reader(lambda _: refuse)
    assert confirm(execution, loaded) == (execution, [])
    loaded.streamed.replace_reader(lambda _: read)
    found = loaded.model(mx.arange(1, 9)[None])  # nothing of the trials is left
    whole = load(EXACT, folder, execution_with("mlx")).model
    assert mx.array_equal(found, whole(mx.arange(1, 9)[None]))


def test_a_rank_that_gets_the_head_has_room_for_fewer_blocks(folder: Path) -> None:
    loaded = load(EXACT, folder, execution_with("mlx").pipelined(BLOCKS))
    assert loaded.streamed is not None
    model = loaded.model.model
    block = sum(int(value.nbytes) for _, value in tree_flatten(model.layers[0].parameters()))
    head = int(model.embed_tokens.weight.nbytes) + int(model.norm.weight.nbytes)
    assert loaded.streamed.blocks_beside({AFTER}, ()) == math.ceil(head / block)
    assert loaded.streamed.blocks_beside({AFTER}, {BEFORE}) == 1  # the norm
    assert loaded.streamed.blocks_beside((), {AFTER}) == 0


def test_half_precision_travels_as_it_is(folder: Path) -> None:
    model = ModelConfig(precision="bfloat16", quantization="none")
    expected = one_node(folder, "mlx", AdapterConfig(), model=model)
    for found in in_stages(layout_of([2, 3]), 2, folder, "mlx", AdapterConfig(), model=model, keep=True):
        assert_same(found, expected, np.testing.assert_array_equal)


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_the_schedule(count: int) -> None:
    """Each pass once, forward before backward, both in order, and no more in flight than there may be."""
    for held in range(1, 8):
        passes = list(one_forward_one_backward(held, count))
        assert sorted(passes) == sorted([Pass(number, way) for number in range(count) for way in (True, False)])
        for way in (True, False):
            assert [number for number, is_forward in passes if is_forward == way] == list(range(count))
        in_flight, most = 0, 0
        for number, is_forward in passes:
            assert is_forward or Pass(number, True) in passes[: passes.index(Pass(number, False))]
            in_flight += 1 if is_forward else -1
            most = max(most, in_flight)
        assert most == min(held, count)
        only_forward = one_forward_one_backward(held, count, backward=False)
        assert list(only_forward) == [Pass(number, True) for number in range(count)]


def test_a_stage_holds_what_there_is_room_for() -> None:
    """Micro-batches on the network beside those of 1F1B, and activations rather than hidden states."""
    roomy = replace(execution_with("mlx"), activation_capacity=100, border_capacity=100)
    assert holding(roomy, 3, 4, can_keep=True) == (5, True)
    assert holding(roomy, 1, 4, can_keep=True) == (1, True)
    assert holding(replace(roomy, activation_capacity=17), 3, 4, can_keep=True) == (4, True)
    assert holding(replace(roomy, activation_capacity=11), 3, 4, can_keep=True) == (5, False)
    assert holding(replace(roomy, border_capacity=0), 3, 4, can_keep=False) == (3, False)
    assert holding(replace(roomy, border_capacity=21), 3, 4, can_keep=False) == (4, False)


def test_even_layouts_agree() -> None:
    places = StagePlaces(Solo(), lambda world_size: even_layout(4, range(world_size)))
    places.agree()
    assert places.shard([0.0]).shares == (1.0,)
    assert not places.channels().peers
