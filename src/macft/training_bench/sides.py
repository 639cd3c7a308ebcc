"""The two trainers that are compared: macft's and mlx-lm's, on the same model, rows, adapter and optimizer.

The device is idle when the time begins, after the warm-up, and when it ends. So it holds the steps that are counted,
all of them and no other.
"""

from __future__ import annotations

import platform
import resource
import statistics
import tempfile
import time
import types
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from macft.checkpoint.saver import CheckpointSaver
from macft.checkpoint.snapshot import Progress
from macft.checkpoint.store import CheckpointStore
from macft.collective.solo import Solo
from macft.data.formats import Row
from macft.data.order import RowOrder
from macft.data.tokenize import tokenize
from macft.model.adapters.adapt import adapt
from macft.model.adapters.settings import AdapterConfig
from macft.model.backends.choose import make_backend
from macft.model.execution import Execution
from macft.report.events import Event, NullReporter, StepDone
from macft.training.build_trainer import TrainingRows, build_trainer
from macft.training.gradients.gradient import GradientComputer, LocalGradient
from macft.training.gradients.reducer import GradientReducer
from macft.training.optimizer import make_optimizer
from macft.training.settings import OptimizerConfig, TrainingConfig
from macft.training.state import TrainState
from macft.training_bench.rows import ROW_KINDS

# isort: split
import mlx.core as mx
import mlx.optimizers as optim
from mlx_lm.tuner.datasets import CacheDataset, create_dataset
from mlx_lm.tuner.trainer import TrainingArgs, train
from mlx_lm.tuner.utils import linear_to_lora_layers

ADAPTER = AdapterConfig(rank=8, scale=20.0, num_layers=16)
OPTIMIZER = OptimizerConfig(name="adam", learning_rate=1e-4, schedule="constant")


@dataclass(frozen=True)
class Training:
    """``steps`` of a kind of rows, of which the first ``warm_up`` (at least 1) are not timed."""

    rows: str
    steps: int
    warm_up: int

    @property
    def batch_size(self) -> int:
        """Rows a step."""
        return ROW_KINDS[self.rows].batch_size

    @property
    def masked(self) -> bool:
        """Whether prompts are no targets."""
        return ROW_KINDS[self.rows].masked

    def config(self) -> TrainingConfig:
        """macft's settings."""
        return TrainingConfig(
            batch_size=self.batch_size, steps=self.steps, eval_every=0, save_every=0, max_grad_norm=0.0
        )


def tokenized(records: Sequence[dict[str, Any]], tokenizer: Any, training: Training) -> list[Row]:
    """The rows of macft's side."""
    return [tokenize(record, tokenizer, mask_prompt=training.masked) for record in records]


def train_macft(model: Any, rows: Sequence[Row], training: Training, execution: Execution) -> dict[str, float]:
    """macft's own loop, without reports, checkpoints and evaluation; the figures of :func:`result`."""
    seconds: list[float] = []
    targets: list[int] = []

    class Steps(NullReporter):
        def handle(self, event: Event) -> None:
            if isinstance(event, StepDone):
                seconds.append(event.seconds)
                targets.append(event.target_tokens)

    class TimedGradient(GradientComputer):
        """A step may still be under way when the next one begins; the first that is timed waits for the one before."""

        began = 0.0

        def __call__(self, step: int, *arguments: Any, **named: Any) -> LocalGradient:
            if step == training.warm_up:
                mx.synchronize()
                self.began = time.perf_counter()
            return super().__call__(step, *arguments, **named)

    adaptation = adapt(model, ADAPTER, seed=0)
    backend = make_backend(execution)
    with tempfile.TemporaryDirectory() as folder, backend.installed(model):
        compute = TimedGradient(model, backend, execution, adaptation.dropout_keys, seed=0)
        build_trainer(
            training.config(),
            OPTIMIZER,
            TrainState(model, make_optimizer(OPTIMIZER), Progress(), GradientReducer(Solo())),
            compute,
            TrainingRows(rows, row_order(len(rows), training)),
            CheckpointSaver(CheckpointStore(Path(folder), keep_last=1)),
            Steps(),
        ).train()
        mx.synchronize()
        elapsed = time.perf_counter() - compute.began
    return result(training, elapsed, seconds[training.warm_up :], sum(targets[training.warm_up :]))


def row_order(count: int, training: Training) -> RowOrder:
    """The order in which macft trains ``count`` rows."""
    return RowOrder([count], [1.0], batch_size=training.batch_size, seed=0)


def mlx_lm_data(records: Sequence[dict[str, Any]], tokenizer: Any, training: Training) -> CacheDataset:
    """The rows of mlx-lm's side, as it makes them."""
    wanted = types.SimpleNamespace(mask_prompt=training.masked)
    return CacheDataset(create_dataset(records, tokenizer, wanted))


def mlx_lm_rows(rows: Sequence[Row]) -> list[tuple[list[int], int]]:
    """Rows that are tokens already, as its tuner takes them: tokens and the length of the prompt."""
    return [(row.tokens.tolist(), row.prompt_length) for row in rows]


def train_mlx_lm(model: Any, data: Any, training: Training) -> dict[str, float]:
    """mlx-lm's own tuner, as mlx_lm.lora calls it, on rows of :func:`mlx_lm_data`; the figures of :func:`result`."""
    mx.random.seed(0)
    add_mlx_lm_adapter(model)
    times: list[float] = []
    trained: list[int] = []

    class Callback:
        def on_train_loss_report(self, info: dict[str, Any]) -> None:
            mx.synchronize()
            times.append(time.perf_counter())
            trained.append(int(info["trained_tokens"]))

        def on_val_loss_report(self, info: dict[str, Any]) -> None:
            raise AssertionError(f"no validation was asked for: {info}")

    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArgs(
            batch_size=training.batch_size,
            iters=training.steps,
            steps_per_report=1,
            steps_per_save=10 * training.steps,
            adapter_file=str(Path(folder) / "adapters.safetensors"),
        )
        optimizer = optim.Adam(OPTIMIZER.learning_rate, bias_correction=True)
        train(model, optimizer, data, None, settings, training_callback=Callback())
    # mlx-lm counts one padding token a row as a target; only the rows' own targets are compared.
    padding = training.batch_size * (training.steps - training.warm_up)
    targets = trained[-1] - trained[training.warm_up - 1] - padding
    return result(training, *since_warm_up(training, times), targets)


def add_mlx_lm_adapter(model: Any) -> None:
    """Puts mlx-lm's adapter, of the same size as macft's, on ``model``."""
    settings = {"rank": ADAPTER.rank, "scale": ADAPTER.scale, "dropout": 0.0}
    linear_to_lora_layers(model, ADAPTER.num_layers, settings)


def since_warm_up(training: Training, times: list[float]) -> tuple[float, list[float]]:
    """Seconds from the end of the warm-up to the last of ``times``, the ends of the steps; and those of each step."""
    timed = times[training.warm_up - 1 :]
    return timed[-1] - timed[0], [b - a for a, b in pairwise(timed)]


def result(training: Training, elapsed: float, steps: list[float], targets: int) -> dict[str, float]:
    """Speed and memory of a training that has just ended; ``steps`` are the seconds of those that were timed."""
    peak_resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1 if platform.system() == "Darwin" else 1024
    return {
        "target_tokens_per_second": targets / elapsed,
        # Without what a shape of batch costs when it comes first, as compiling does.
        "median_step_ms": 1000 * statistics.median(steps),
        "rows_per_second": training.batch_size * len(steps) / elapsed,
        "peak_resident_gb": peak_resident * unit / 1e9,
        "peak_mlx_gb": mx.get_peak_memory() / 1e9,
    }
