"""A node that trains alone computes on while the last step's numbers are read, and learns the same."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from harness.execution import execution_with
from helpers.models import assert_same_gradient, make_model
from macft.checkpoint.saver import CheckpointSaver
from macft.checkpoint.snapshot import Progress
from macft.checkpoint.store import CheckpointStore
from macft.collective.solo import Solo
from macft.data.formats import Row
from macft.data.order import RowOrder
from macft.errors import NonFiniteLoss
from macft.model.adapters.adapt import adapt
from macft.model.adapters.settings import AdapterConfig
from macft.model.backends.choose import make_backend
from macft.model.joined_parameters import JoinedParameters
from macft.parallel.shares import DataShard
from macft.report.events import Evaluated, Event, NullReporter, StepDone
from macft.training.batch_loader import BatchLoader
from macft.training.build_trainer import NodeSetup, TrainingRows, build_trainer
from macft.training.gradients.gradient import GradientComputer
from macft.training.gradients.reducer import GradientReducer
from macft.training.loop import Trainer
from macft.training.optimizer import OptimizerStep, make_optimizer
from macft.training.settings import OptimizerConfig, TrainingConfig
from macft.training.state import TrainState
from macft.training.throttle import NoThrottle

ROWS = 24


def rows() -> list[Row]:
    generator = np.random.default_rng(5)
    lengths = generator.integers(5, 40, ROWS)
    return [Row(generator.integers(1, 97, n).astype(np.int32), int(generator.integers(0, n - 2))) for n in lengths]


class Recorder(NullReporter, NoThrottle):
    """Records what is reported, and when micro-batches begin and steps end."""

    def __init__(self) -> None:
        self.entries: list[str] = []
        self.steps: list[StepDone] = []
        self.step = self.micro_batch = 0

    def begin_step(self, micro_batches: int) -> None:
        self.announced = micro_batches

    def before_micro_batch(self) -> None:
        if self.micro_batch == 0:
            self.step += 1
        self.entries.append(f"begin {self.step}.{self.micro_batch}")
        self.micro_batch = (self.micro_batch + 1) % self.announced

    def step_computed(self) -> None:
        if self.entries[-1] != f"end {self.step}":
            self.entries.append(f"end {self.step}")

    def handle(self, event: Event) -> None:
        match event:
            case StepDone():
                self.entries.append(f"reported {event.step}")
                self.steps.append(event)
            case Evaluated():
                self.entries.append(f"evaluated {event.step}")


@pytest.fixture
def installed() -> Iterator[ExitStack]:
    """Of the models that are trained, their backends' operations."""
    with ExitStack() as stack:
        yield stack


def trainer(
    installed: ExitStack,
    folder: Path,
    recorder: Recorder,
    *,
    compiling: str,
    optimizer: OptimizerConfig | None = None,
    **config: Any,
) -> Trainer:
    model = make_model("llama")
    adaptation = adapt(model, AdapterConfig(rank=4), seed=1)
    data = rows()
    training = TrainingConfig(**{"batch_size": 4, "steps": 6, "eval_every": 3, "save_every": 0, **config})
    execution = execution_with(
        "mlx",
        packing=training.packing != "false",
        compiled=compiling == "true",
        micro_batch_size=training.micro_batch_size,
        evaluation_rows=training.micro_batch_size or 8,
    )
    backend = make_backend(execution)
    installed.enter_context(backend.installed(model))
    compute = GradientComputer(model, backend, execution, adaptation.dropout_keys, seed=0)
    optimizer = optimizer or OptimizerConfig(learning_rate=0.01)
    order = RowOrder([ROWS], [1.0], batch_size=training.batch_size, seed=0)
    state = TrainState(model, make_optimizer(optimizer), Progress(), GradientReducer(Solo()))
    saver = CheckpointSaver(CheckpointStore(folder, keep_last=2))
    kept = TrainingRows(data, order, data[:5])
    return build_trainer(training, optimizer, state, compute, kept, saver, recorder, NodeSetup(throttle=recorder))


@pytest.mark.parametrize("packing", ["true", "false"])
@pytest.mark.parametrize("micro_batch", [None, 3])
def test_queued_steps_learn_what_synchronous_ones_do(
    tmp_path: Path, micro_batch: int | None, packing: str, installed: ExitStack
) -> None:
    recorders, adapters = [], []
    for word in ("true", "false"):
        recorders.append(Recorder())
        run = trainer(
            installed,
            tmp_path / word,
            recorders[-1],
            compiling=word,
            micro_batch_size=micro_batch,
            max_grad_norm=0.5,
            packing=packing,
        )
        assert run.train() == "finished"
        adapters.append(dict(tree_flatten(run.state.model.trainable_parameters())))
    queued, plain = (recorder.steps for recorder in recorders)
    assert [event.step for event in queued] == [event.step for event in plain] == [1, 2, 3, 4, 5, 6]
    for found, expected in zip(queued, plain, strict=True):
        assert found.loss == pytest.approx(expected.loss, rel=1e-4)
        assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-3)
        for name in ("epoch", "learning_rate", "tokens", "node_tokens", "target_tokens", "shares", "bytes_sent"):
            assert getattr(found, name) == getattr(expected, name), name
        assert found.seconds == pytest.approx(sum(found.parts.values()))
        assert found.nodes[0].tokens == expected.nodes[0].tokens
    assert_same_gradient(adapters[0], adapters[1], rtol=1e-3)


def test_the_next_step_begins_before_the_last_one_is_reported(tmp_path: Path, installed: ExitStack) -> None:
    recorder = Recorder()
    trainer(installed, tmp_path, recorder, compiling="true", micro_batch_size=2).train()
    expected = ["evaluated 0"]
    for step in range(1, 7):
        if step not in (1, 4):  # validation comes before, and waits for the numbers
            expected += [f"end {step - 1}"]
        expected += [f"begin {step}.0", f"begin {step}.1"]
        if step not in (1, 4):
            expected += [f"reported {step - 1}"]
        if step in (3, 6):
            expected += [f"end {step}", f"reported {step}", f"evaluated {step}"]
    assert recorder.entries == expected


def test_a_step_that_is_not_finite_changes_nothing(tmp_path: Path, installed: ExitStack) -> None:
    """The first update leads far away; the second step's loss is NaN, found out when the third has begun."""
    recorder = Recorder()
    explode = OptimizerConfig(name="sgd", learning_rate=1e30, schedule="constant")
    run = trainer(installed, tmp_path, recorder, compiling="true", optimizer=explode, eval_every=0, max_grad_norm=0.0)
    with pytest.raises(NonFiniteLoss, match=r"^step 2: the loss is (nan|inf)"):
        run.train()
    assert [event.step for event in recorder.steps] == [1]
    assert run.state.progress.step == 1
    damaged = trainer(installed, tmp_path, Recorder(), compiling="true", eval_every=0)
    damaged.state.model.update(tree_map(lambda weight: weight * mx.nan, damaged.state.model.trainable_parameters()))
    with pytest.raises(NonFiniteLoss, match=r"^step 1: the loss is nan .* No step was before it: the model's weights"):
        damaged.train()
    once = trainer(
        installed, tmp_path, Recorder(), compiling="true", optimizer=explode, eval_every=0, max_grad_norm=0.0, steps=1
    )
    once.train()
    found, expected = (dict(tree_flatten(each.state.model.trainable_parameters())) for each in (run, once))
    for name, value in expected.items():
        np.testing.assert_array_equal(np.array(found[name]), np.array(value))


@pytest.mark.parametrize("max_norm", [0.0, 0.1, 1e6])
def test_the_queued_update_is_the_other_one(max_norm: float) -> None:
    found = []
    for queued in (True, False):
        model = make_model("llama")
        adapt(model, AdapterConfig(rank=4), seed=1)
        update = OptimizerStep(model, make_optimizer(OptimizerConfig()), compiled=True)
        mx.random.seed(2)
        parameters = tree_flatten(model.trainable_parameters())
        for step in range(3):
            gradient = {key: mx.random.normal(value.shape) for key, value in parameters}
            norm = math.sqrt(sum(float(np.square(np.array(value)).sum()) for value in gradient.values())) / 7
            if queued:
                joined = JoinedParameters.of(model).join(gradient)
                loss, told = update.queue(joined, 1e-3 * (step + 1), mx.array(14.0), 7, max_norm)
                assert (loss.item(), told.item()) == (pytest.approx(2.0), pytest.approx(norm, rel=1e-5))
            else:
                clip = max_norm / norm if max_norm and norm > max_norm else 1.0
                update(gradient, 1e-3 * (step + 1), clip / 7)
        found.append(dict(tree_flatten(model.trainable_parameters())))
    for key, value in found[0].items():
        np.testing.assert_allclose(np.array(value), np.array(found[1][key]), rtol=1e-5, atol=1e-7)


def test_batches_made_ahead_are_those_asked_for() -> None:
    """Whatever the shares have become in the meantime."""
    order = RowOrder([ROWS], [1.0], batch_size=8, seed=0)

    def ids(loader: BatchLoader, step: int, shard: DataShard) -> list[list[int]]:
        return [batch.row_ids.tolist() for batch in loader.batches(step, shard)]

    even, uneven = DataShard(1, 2, (0.5, 0.5)), DataShard(1, 2, (0.9, 0.1))
    ahead, fresh = (BatchLoader(rows(), order, 2, shared=True) for _ in range(2))
    ahead.prepare(3, even)
    assert ids(ahead, 3, even) == ids(fresh, 3, even)
    ahead.prepare(4, even)
    assert ids(ahead, 4, uneven) == ids(fresh, 4, uneven) != ids(fresh, 4, even)
    ahead.prepare(5, even)
    assert ids(ahead, 3, even) == ids(fresh, 3, even)
