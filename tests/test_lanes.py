"""Parts of a micro-batch side by side, on a thread each: the same numbers, in any order of the threads."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from helpers.computing import gradient_computer, randomize_adapter, token_loss
from helpers.models import assert_same_gradient, make_model
from macft.collective.solo import Solo
from macft.data.batch import Batch, collate, micro_batches, pack
from macft.data.formats import Row
from macft.device import blas
from macft.device.kind import METAL, Device
from macft.device.mlx_device import on_cpu
from macft.model.adapters.adapt import adapt
from macft.model.adapters.settings import AdapterConfig
from macft.model.execution import WeightFormat, resolve
from macft.model.settings import ModelConfig
from macft.parallel.shares import DataShard
from macft.planner.workload import DeviceBatchShape, StepRows
from macft.training.batch_layout import BatchLayout
from macft.training.gradients.gradient import GradientComputer, LocalGradient
from macft.training.validation import validation_loss

pytestmark = pytest.mark.skipif(
    not (on_cpu() and blas.library() is not None), reason="lanes are of the CPU backend, for a Linux CPU with OpenBLAS"
)
SECONDS = 60


def some_rows() -> list[Row]:
    """Two begin alike, and one has no target."""
    generator = np.random.default_rng(3)
    rows = [Row(generator.integers(1, 97, n).astype(np.int32), 4) for n in (100, 70, 90, 33, 12)]
    return [*rows, Row(np.append(rows[0].tokens[:60], [5, 6, 7]).astype(np.int32), 10), Row(rows[1].tokens, 70)]


def batches() -> list[Batch]:
    rows = some_rows()
    return micro_batches(rows, np.arange(len(rows)), 5)


@contextmanager
def computer(lanes: int, kind: str = "lora", dropout: float = 0.0, **fields: Any) -> Iterator[GradientComputer]:
    model = make_model("llama")
    adaptation = adapt(model, AdapterConfig(type=kind, rank=4, dropout=dropout), seed=1)
    if kind != "full":
        randomize_adapter(model, scale=0.02)
    with gradient_computer(model, adaptation, "cpu", lanes=lanes, **{"packing": True, **fields}) as compute:
        yield compute


def gradient_of(lanes: int, *options: Any, **fields: Any) -> LocalGradient:
    with computer(lanes, *options, **fields) as compute:
        return compute(3, batches())


def assert_same_bits(found: LocalGradient, expected: LocalGradient) -> None:
    assert [value.item() for value in found.losses] == [value.item() for value in expected.losses]
    for name, value in expected.gradient.items():
        np.testing.assert_array_equal(np.array(found.gradient[name]), np.array(value))


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize(("kind", "recompute"), [("lora", "none"), ("dora", "blocks"), ("full", "none")])
def test_lanes_compute_what_one_thread_does(kind: str, recompute: str, dropout: float, packing: bool) -> None:
    one, two, again, three = (
        gradient_of(lanes, kind, dropout, recompute=recompute, packing=packing) for lanes in (1, 2, 2, 3)
    )
    assert len(one.losses) == 2
    assert len(two.losses) > 2
    for found in (two, three):
        assert found.loss_sum == pytest.approx(one.loss_sum, rel=1e-6)
        assert (found.tokens, found.target_tokens) == (one.tokens, one.target_tokens)
        assert_same_gradient(found.gradient, one.gradient, rtol=1e-5)
    assert_same_bits(again, two)


@pytest.mark.parametrize("first", [1, 2])
def test_the_order_in_which_lanes_finish_changes_no_bit(first: int) -> None:
    """The other lane begins when the ``first`` one has computed its loss, in each micro-batch."""
    with computer(2) as compute:
        expected = compute(3, batches())
        loss, done, order = compute.loss, threading.Semaphore(0), []

        def in_turn(*inputs: mx.array, lane: int = 0) -> mx.array:
            if lane not in (0, first):
                assert done.acquire(timeout=SECONDS)
            order.append(lane)
            result = loss(*inputs, lane=lane)
            mx.eval(result)
            if lane == first:
                done.release()
            return result

        in_turn.lanes = loss.lanes  # type: ignore[attr-defined]
        compute.loss = in_turn  # type: ignore[assignment]
        assert_same_bits(compute(3, batches()), expected)
        assert order[:2] == [first, 3 - first]


def test_the_micro_batch_before_is_computed_when_the_next_one_begins() -> None:
    with computer(2) as compute:
        loss, events = compute.loss, []

        def noted(*inputs: mx.array, lane: int = 0) -> mx.array:
            result = loss(*inputs, lane=lane)
            mx.eval(result)
            events.append("part")
            return result

        noted.lanes = loss.lanes  # type: ignore[attr-defined]
        compute.loss = noted  # type: ignore[assignment]
        compute(0, batches(), lambda: events.append("micro-batch"))
    assert events == 2 * ["micro-batch", "part", "part"]


def test_an_updated_parameter_reaches_every_lane() -> None:
    with computer(2) as compute, computer(1) as plain:
        for step in range(2):
            found, expected = compute(step, batches()), plain(step, batches())
            assert_same_gradient(found.gradient, expected.gradient, rtol=1e-5)
            for each in (compute, plain):
                model = each.loss.lanes.models[0]
                model.load_weights(
                    [(name, value + 0.1) for name, value in tree_flatten(model.trainable_parameters())], strict=False
                )


def threads_of_process() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


@pytest.mark.parametrize("failing", [1, 2])
def test_an_error_in_a_lane_reaches_the_caller(failing: int) -> None:
    """The next step is computed as if nothing had been, and no thread is added."""
    gradient_of(2)
    before = threads_of_process()
    with computer(2) as compute:
        expected, loss, ended = compute(3, batches()), compute.loss, []

        def fails(*inputs: mx.array, lane: int = 0) -> mx.array:
            if lane == failing:
                raise ZeroDivisionError
            result = loss(*inputs, lane=lane)
            ended.append(lane)
            return result

        fails.lanes = loss.lanes  # type: ignore[attr-defined]
        compute.loss = fails  # type: ignore[assignment]
        with pytest.raises(ZeroDivisionError):
            compute(3, batches())
        assert ended == [3 - failing]
        assert blas.threads() == blas.available_cores()
        compute.loss = loss
        assert_same_bits(compute(3, batches()), expected)
    assert threads_of_process() <= before


COMPILES_IN_LANES = """
import mlx.core as mx
import mlx.nn as nn
from macft.model.backends.cpu.lanes import ThreadLanes

def compiled(lane, count):
    functions = [mx.compile(lambda x, n=n: mx.exp(x) * n) for n in range(count)]
    mx.eval([function(mx.ones(4)) for function in functions])
    return functions

kept = list(ThreadLanes([nn.Linear(2, 2) for _ in range(5)]).map(compiled, [200] * 4))
"""


def test_a_process_whose_lanes_compiled_functions_ends_in_order() -> None:
    # Models bring such functions. Freed by a thread while the interpreter closes down, they would abort the process.
    for _ in range(2):
        ended = subprocess.run([sys.executable, "-c", COMPILES_IN_LANES], capture_output=True, text=True)
        assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize("packing", [True, False])
def test_validation_by_lanes(packing: bool) -> None:
    results = []
    for lanes in (1, 2, 2):
        with token_loss(make_model("llama"), "cpu", packing=packing, lanes=lanes) as (loss, execution):
            model, shard = loss.lanes.models[0], DataShard(0, 1)
            results.append(
                validation_loss(model, loss, execution, some_rows(), Solo(), shard=shard, progress=lambda *_: None)
            )
    one, two, again = results
    assert two.loss == pytest.approx(one.loss, rel=1e-6)
    assert two.target_tokens == one.target_tokens
    assert again.loss == two.loss


@given(
    data=st.lists(st.tuples(st.integers(0, 2), st.integers(2, 300), st.integers(0, 300)), min_size=1, max_size=24),
    lanes=st.integers(1, 5),
    shared=st.booleans(),
    most=st.none() | st.integers(1, 400),
)
def test_packs_for_lanes(data: list[tuple[int, int, int]], lanes: int, shared: bool, most: int | None) -> None:
    """Each row once, none too long a pack, and no division of the rows in that order has a smaller largest pack."""
    rows = [Row(np.arange(start, n + start, dtype=np.int32), prompt) for start, n, prompt in data]
    batch = collate(rows, np.arange(len(rows)))
    packs, plain = (pack(batch, most, shared=shared, lanes=count) for count in (lanes, 1))
    ids = [int(row) for item in packs for row in item.row_ids]
    assert ids == [int(row) for item in plain for row in item.row_ids]
    if 2 * len(ids) <= lanes:
        assert len(packs) == len(plain)
        return
    sizes = [item.inputs.shape[1] for item in packs]
    assert all(most is None or size <= most or len(item.lengths) == 1 for size, item in zip(sizes, packs, strict=True))
    rounds = -(-len(plain) // lanes)
    assert len(packs) <= rounds * lanes
    if ids:
        assert max(sizes) <= max(max(item.inputs.shape[1] for item in plain), max(max(x.lengths) for x in plain))


@pytest.mark.parametrize("packing", [True, False])
def test_the_plan_counts_what_lanes_compute_at_the_same_time(packing: bool) -> None:
    """The parts of a micro-batch, and never those of two."""
    layout = BatchLayout(packing=packing, pack_tokens=100, lanes=2)
    step = StepRows(some_rows(), np.arange(7))
    planned = step.device_batches(5, layout)
    by_batch = [[DeviceBatchShape.from_batch(part) for part in layout.parts(batch)] for batch in batches()]
    assert sum(shape.parts for shape in planned) == sum(map(len, by_batch))
    assert [len(parts) for parts in by_batch] == ([3, 2] if packing else [2, 2])
    pairs = [parts[start : start + 2] for parts in by_batch for start in range(0, len(parts), 2)]
    for shape, parts in zip(planned, pairs, strict=True):
        assert shape.tokens == sum(part.tokens for part in parts)
        assert shape.targets == sum(part.targets for part in parts)
        assert shape.length == max(part.length for part in parts)


def test_lanes_are_the_cores_of_the_cpu_backend() -> None:
    def lanes(device: Device, **wishes: str) -> int:
        return resolve(ModelConfig(), WeightFormat("float32"), device, **wishes).lanes

    cpu = Device("cpu", openblas=True, cores=4)
    assert lanes(cpu) == 4
    assert lanes(cpu.shared_by(3)) == lanes(cpu.shared_by(8)) == 1
    assert lanes(cpu, kernels="mlx") == lanes(METAL) == lanes(Device("cpu", cores=4)) == 1


@pytest.mark.parametrize(("lanes", "parts"), [(1, 1), (2, 2), (3, 3), (5, 5), (6, 6), (8, 1)])
@pytest.mark.parametrize("packing", [True, False])
def test_rows_of_one_length_are_divided_evenly(lanes: int, parts: int, packing: bool) -> None:
    """Where most lanes would have no row, all threads share each product, so that rows stay together."""
    generator = np.random.default_rng(0)
    rows = [Row(generator.integers(1, 97, 33).astype(np.int32), 0) for _ in range(4 if lanes > 5 else lanes)]
    layout = BatchLayout(packing=packing, lanes=lanes)
    sizes = [part.inputs.size for part in layout.parts(collate(rows, np.arange(len(rows))))]
    assert len(sizes) == min(parts, len(rows))
    assert len(set(sizes)) == 1
