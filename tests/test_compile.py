"""Compiled, a step computes what it computes otherwise, and what is compiled for one batch serves many."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from harness.execution import execution_with
from helpers.computing import gradient_computer, randomize_adapter
from helpers.models import assert_same_gradient, make_model
from macft.data.batch import (
    Batch,
    coarse_length,
    coarse_targets,
    micro_batches,
    pack,
    pad_pack_to_bucket,
    pad_to_bucket,
)
from macft.data.formats import Row
from macft.errors import ConfigError
from macft.model.adapters.adapt import adapt
from macft.model.adapters.settings import AdapterConfig
from macft.model.backends.choose import make_backend
from macft.planner.workload import StepRows
from macft.training.batch_layout import BatchLayout
from macft.training.gradients.gradient import GradientComputer, LocalGradient
from macft.training.optimizer import OptimizerStep, make_optimizer
from macft.training.settings import OptimizerConfig, TrainingConfig, problems
from macft.training.targets import target_positions

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None and mx.default_device() == mx.cpu, reason="on a CPU MLX compiles with g++"
)


@contextmanager
def computer(
    kernels: str, *, compiled: bool = False, recompute: str = "none", packing: bool = False, dropout: float = 0.3
) -> Iterator[tuple[nn.Module, GradientComputer]]:
    model = make_model("llama")
    adaptation = adapt(model, AdapterConfig(rank=4, dropout=dropout), seed=1)
    randomize_adapter(model)
    with gradient_computer(
        model, adaptation, kernels, packing=packing, compiled=compiled, recompute=recompute, loss_chunk=40
    ) as compute:
        yield model, compute


def batches(seed: int, count: int, *, most: int = 60, micro_batch: int = 2) -> list[Batch]:
    generator = np.random.default_rng(seed)
    lengths = [int(length) for length in generator.integers(4, most, count)]
    rows = [Row(generator.integers(1, 97, n).astype(np.int32), int(generator.integers(0, n - 1))) for n in lengths]
    return micro_batches(rows, np.arange(count), micro_batch)


def same(found: LocalGradient, expected: LocalGradient) -> None:
    assert found.target_tokens == expected.target_tokens
    assert found.tokens == expected.tokens
    assert found.loss_sum == pytest.approx(expected.loss_sum, rel=1e-5)
    assert_same_gradient(found.gradient, expected.gradient, rtol=2e-4)


@pytest.mark.parametrize(
    ("packing", "dropout"),
    [
        pytest.param(False, 0.3, marks=pytest.mark.slow),
        pytest.param(True, 0.3, marks=pytest.mark.slow),
        (True, 0.0),
    ],
)
@pytest.mark.parametrize("recompute", ["none", "blocks"])
def test_gradients_are_those_of_the_uncompiled_step(
    recompute: str, packing: bool, dropout: float, kernels: str
) -> None:
    """Two steps of several micro-batches, packed or padded, chunks of the loss, and an update in between.

    What is compiled is the portable path; ``kernels`` are those of the uncompiled step.
    """
    optimizer = OptimizerConfig(name="sgd")
    with (
        computer("mlx", compiled=True, recompute=recompute, packing=packing, dropout=dropout) as (model, compiled),
        computer(kernels, recompute=recompute, dropout=dropout) as (other, plain),
    ):
        for step in range(2):
            work = batches(step, 5)
            found, expected = compiled(step, work), plain(step, work)
            same(found, expected)
            assert found.gradient.keys() == dict(tree_flatten(model.trainable_parameters())).keys()
            for each in (model, other):
                OptimizerStep(each, make_optimizer(optimizer))(expected.gradient, 1e-4)


def test_the_kernels_of_a_cpu_are_not_compiled() -> None:
    with pytest.raises(ConfigError, match=r"training\.kernels"):
        make_backend(execution_with("cpu", compiled=True))


def shapes_of(work: list[Batch], *, coarse: bool) -> set[tuple[Any, ...]]:
    wide = [pad_to_bucket(batch) if coarse else batch for batch in work]
    return {(batch.tokens.shape, target_positions(batch, coarse=coarse)[0].shape) for batch in wide}


def test_a_shape_is_compiled_once() -> None:
    traced = []
    work = batches(3, 60)
    with computer("mlx", compiled=True) as (_, compute):
        loss = compute.loss

        def recorded(inputs: Any, positions: Any, *rest: Any, **lane: Any) -> Any:
            rows, length = inputs.shape
            traced.append(((rows, length + 1), positions.shape))
            return loss(inputs, positions, *rest, **lane)

        compute.loss = recorded  # type: ignore[assignment]
        for step in range(2):
            compute(step, work)
    # A step's first, which has no sums to add to, and the others.
    assert len(traced) == 1 + len(shapes_of(work[1:], coarse=True))
    assert set(traced) == shapes_of(work, coarse=True)
    assert len(traced) < len(shapes_of(work, coarse=False))


@pytest.mark.parametrize("name", ["adamw", pytest.param("muon", marks=pytest.mark.slow)])
def test_a_compiled_update_is_the_uncompiled_one(name: str) -> None:
    config = OptimizerConfig(name=name)
    found = []
    for compiled in (True, False):
        model = make_model("llama")
        adapt(model, AdapterConfig(rank=4), seed=1)
        update = OptimizerStep(model, make_optimizer(config), compiled=compiled)
        mx.random.seed(2)
        parameters = tree_flatten(model.trainable_parameters())
        for step in range(3):
            gradient = {key: mx.random.normal(value.shape) for key, value in parameters}
            update(gradient, 1e-3 * (step + 1), 0.5)
        found.append(dict(tree_flatten(model.trainable_parameters())))
    for key, value in found[0].items():
        np.testing.assert_allclose(np.array(value), np.array(found[1][key]), rtol=1e-4, atol=1e-6)


def test_many_packs_have_few_shapes() -> None:
    work = [batch for seed in range(200) for batch in batches(seed, 4, most=128, micro_batch=4)]
    packs = [item for batch in work for item in pack(batch, None, shared=True)]
    assert sum(item.inputs.shape[1] for item in map(pad_pack_to_bucket, packs)) < 1.15 * sum(
        i.inputs.shape[1] for i in packs
    )
    shapes = {(item.inputs.shape, item.paths.shape, item.targets.shape) for item in packs}
    wide = {(item.inputs.shape, item.paths.shape, item.targets.shape) for item in map(pad_pack_to_bucket, packs)}
    assert len(wide) < min(50, len(shapes) / 3)


@pytest.mark.parametrize("most", [128, 2048])
def test_many_batches_have_few_shapes(most: int) -> None:
    work = [batch for seed in range(200) for batch in batches(seed, 8, most=most, micro_batch=4)]
    assert len(shapes_of(work, coarse=True)) < min(45, len(shapes_of(work, coarse=False)) / 2)


def test_the_plan_counts_what_a_compiled_step_computes() -> None:
    generator = np.random.default_rng(5)
    rows = [Row(np.ones(n, np.int32), int(generator.integers(0, n - 1))) for n in generator.integers(4, 300, 24)]
    step = StepRows(rows, np.arange(24))
    planned = step.device_batches(8, BatchLayout(compiled=True))
    for batch, part in zip(micro_batches(rows, step.ids, 8), planned, strict=True):
        ((shape, positions),) = shapes_of([batch], coarse=True)
        assert ((part.rows, part.length + 1), (part.targets,)) == (shape, positions)


@given(length=st.integers(1, 100_000), share=st.floats(0, 1), rows=st.integers(1, 64))
def test_coarse_sizes_waste_little(length: int, share: float, rows: int) -> None:
    width = coarse_length(length) - 1
    assert width % 32 == 0
    assert length - 1 <= width <= max(1.25 * length, length + 31)
    count = round(share * rows * width)
    assert count <= coarse_targets(count, rows * width) <= max(2 * count + 1, 191, min(4 * count + 3, 1280))


def test_there_are_few_coarse_sizes() -> None:
    assert len({coarse_length(length) for length in range(1, 2050)}) == 20
    assert len({coarse_targets(count, 4 * 1024) for count in range(4097)}) == 6


def test_a_word_that_is_none_is_named() -> None:
    assert problems(TrainingConfig(steps=1, compile="yes"), OptimizerConfig()) == [
        "training.compile: 'yes' is not auto, true or false"
    ]
