"""The same command gives the same bits: neither the measured speed of the links nor the load of the machine shows."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.runs import adapter, events, losses, same_bits, train_to_end
from helpers.computing import gradient_computer, randomize_adapter
from helpers.models import assert_same_gradient, make_model, random_rows
from helpers.rings import local_listeners, run_ranks
from macft.collective.ring.ring import Ring
from macft.collective.ring.tuning import Tuning
from macft.data.batch import micro_batches
from macft.model.adapters.adapt import adapt
from macft.model.adapters.settings import AdapterConfig
from macft.training.gradients.exact_sums import ExactParameters, ExactStepGradient, from_grid, to_grid
from macft.training.gradients.reducer import GradientReducer


def sums(world_size: int, kind: mx.Dtype, size: int, gather_reduce_bytes: int) -> list[bytes]:
    """The bits of each rank's sum, with the algorithm that ``gather_reduce_bytes`` chooses."""

    def work(ring: Ring) -> bytes:
        ring.tuning = ring.tuning._replace(gather_reduce_bytes=gather_reduce_bytes)
        values = np.random.default_rng(ring.rank).standard_normal(size) * 10.0 ** np.arange(size).astype(float).clip(
            0, 4
        )
        arrays = [
            mx.array(values.astype(np.float32)).astype(kind),
            mx.array(values[:5].astype(np.float32)).astype(kind),
        ]
        mx.eval(arrays)
        ring.all_reduce(arrays)
        return b"".join(bytes(memoryview(array)) for array in arrays)

    return run_ranks(local_listeners(world_size), work)


@pytest.mark.parametrize("world_size", [2, 3, 4, 5])
@pytest.mark.parametrize("kind", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("size", [3, 20_000, 50_001])
def test_both_algorithms_give_the_same_bits(world_size: int, kind: mx.Dtype, size: int) -> None:
    """Which one sums how many bytes follows the measured latency and speed of the links."""
    exchanged, in_pieces = sums(world_size, kind, size, 1 << 30), sums(world_size, kind, size, 0)
    assert set(exchanged) == set(in_pieces)
    assert len(set(exchanged)) == 1


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("codec", ["none", "bfloat16", "int8", "powersgd"])
def test_the_size_of_a_piece_does_not_show(world_size: int, codec: str) -> None:
    """It follows the measured speed; int8 has a scale for each block of 256 values."""

    def work(ring: Ring, piece_bytes: int) -> bytes:
        ring.tuning = Tuning(gather_reduce_bytes=0, piece_bytes=piece_bytes)
        reducer = GradientReducer(ring, codec)
        random, bits = np.random.default_rng(ring.rank), b""
        for _ in range(3):  # the rounding errors of a step come into the next one
            array = random.standard_normal((150, 130)).astype(np.float32)
            reducer.all_reduce(["a"], [array])
            bits += array.tobytes()
        return bits

    results = {
        bits
        for piece_bytes in (4096, 4104, 16_000, 1 << 20)
        for bits in run_ranks(local_listeners(world_size), lambda ring, piece=piece_bytes: work(ring, piece))
    }
    assert len(results) == 1


values = st.floats(-(2.0**30), 2.0**30, width=32) | st.floats(-1, 1, width=32)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.lists(values, min_size=3, max_size=3), min_size=1, max_size=40), st.integers(1, 5), st.randoms())
def test_exact_sums_have_the_same_bits_in_any_order_over_any_nodes(
    parts: list[list[float]], world_size: int, random: Random
) -> None:
    def total(groups: list[list[list[float]]]) -> bytes:
        over_ranks = np.zeros((2, 3))
        for group in groups:
            own = np.zeros((2, 3))
            for part in group:
                to_grid(np.array(part, np.float32), own)
            over_ranks += own
        return from_grid(over_ranks).tobytes()

    expected = total([parts])
    random.shuffle(parts)
    assert total([parts[rank::world_size] for rank in range(world_size)]) == expected
    summed = [math.fsum(column) for column in zip(*parts, strict=True)]
    assert np.allclose(np.frombuffer(expected, np.float32), summed, rtol=1e-6, atol=len(parts) * 2.0**-50)


def test_an_exact_gradient_is_that_of_all_micro_batches_whoever_computes_them() -> None:
    model = make_model("llama")
    adaptation = adapt(model, AdapterConfig(rank=4), seed=1)
    randomize_adapter(model)
    batches = micro_batches(random_rows(0, masked=True), np.arange(4), 1)
    with gradient_computer(model, adaptation, "mlx") as compute:
        expected = compute(0, batches)
        shapes = {name: value.shape for name, value in expected.gradient.items()}
        exact = ExactStepGradient(compute, ExactParameters(shapes, [list(shapes)]))
        totals = []
        for split in ([batches], [batches[:1], batches[1:]], [batches[2:], [], batches[1::-1]]):
            parts = [exact(0, part) for part in split]
            assert sum(part.target_tokens for part in parts) == expected.target_tokens
            sums = {name: sum(part.halves[name] for part in parts) for name in shapes}
            totals.append((sum(part.loss_sum for part in parts), {name: from_grid(sums[name]) for name in shapes}))
    assert totals[0][0] == totals[1][0] == totals[2][0] == pytest.approx(expected.loss_sum, rel=1e-6)
    for _, gradient in totals[1:]:
        assert all(gradient[name].tobytes() == totals[0][1][name].tobytes() for name in shapes)
    total = {name: mx.array(value.reshape(shapes[name])) for name, value in totals[0][1].items()}
    assert_same_gradient(total, expected.gradient, 1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e11])
def test_what_is_not_finite_stays_so(value: float) -> None:
    halves = np.zeros((2, 2))
    to_grid(np.array([value, 1.0], np.float32), halves)
    assert np.isnan(from_grid(halves)).tolist() == [True, False]


SPINNING = """
import time
while True:
    end = time.perf_counter() + 0.03
    while time.perf_counter() < end:
        pass
    time.sleep(0.03)
"""


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """So many processes that compute half of the time, beside whatever the block does."""
    spinning = [subprocess.Popen([sys.executable, "-c", SPINNING]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in spinning:
            process.kill()
            process.wait()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ten_runs_under_changing_load_have_the_same_bits(
    tmp_path: Path, tiny_task: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command twice, with a codec too; with training.deterministic any nodes, stages and losses of nodes."""
    basics = [
        *tiny_task,
        "training.batch_size=6",
        "training.micro_batch_size=2",
        "training.steps=4",
        "training.eval_every=0",
        "training.save_every=0",
        "training.kernels=mlx",
        "adapter.rank=64",
        "optimizer.learning_rate=1e-2",
        "collective.bucket_bytes=40000",  # of such a size that the measured speed decides which algorithm sums it
        "report.console=false",
        "report.tensorboard=false",
        "topology=local",
    ]
    deterministic = [
        "training.deterministic=true",
        "training.eval_every=2",
        "dataset.metric=perplexity",
        "training.metric_rows=6",
    ]
    kinds = {
        "exact": ["topology.nodes=3"],
        "int8": ["topology.nodes=2", "collective.codec=int8"],
        "alone": ["topology=single", *deterministic],
        "streamed": ["topology=single", "topology.placement=stream", *deterministic],
        "unequal": ["topology.nodes=2", "topology.shares=[3,1]", *deterministic],
        "by speed": ["topology.nodes=3", "topology.shares=auto", "topology.rebalance_every=1", *deterministic],
        "pipeline": ["topology.nodes=2", "topology.placement=pipeline", *deterministic],
        "two of two": ["topology.nodes=4", "topology.placement=pipeline", "topology.pipelines=2", *deterministic],
    }
    killed = {"by speed": "reduce:1:kill", "two of two": "micro_batch:0:kill"}
    order = ["exact", "int8", *list(kinds)[2:], "int8", "exact"]
    finished: dict[str, list[Path]] = {}
    for number, kind in enumerate(order):
        monkeypatch.setenv("MACFT_FAULT", killed.get(kind, ""))
        with busy(number % 4):
            run = train_to_end(*basics, *kinds[kind], folder=tmp_path / str(number))
        finished.setdefault("deterministic" if deterministic[0] in kinds[kind] else kind, []).append(run)
        assert len(events(run, "nodes_changed")) == (kind in killed)
    for runs in finished.values():
        assert all(losses(run) == losses(runs[0]) for run in runs)
        assert all(same_bits(adapter(run), adapter(runs[0])) for run in runs)
    assert not same_bits(adapter(finished["exact"][0]), adapter(finished["int8"][0]))
    for event, key, count in (("evaluated", "loss", 3), ("metric_scored", "value", 2)):
        first, *others = [[each[key] for each in events(run, event)] for run in finished["deterministic"]]
        assert len(first) == count
        assert all(other == first for other in others)
    assert losses(finished["deterministic"][0]) == pytest.approx(losses(finished["exact"][0]), rel=1e-4)
