"""Blocks read from disk against the same blocks in memory, both recomputed: seconds a step, and memory.

    python benchmarks/big_models.py [--kernels mlx] [--rows 8] [--length 250] [--steps 5] [--cold]

SmolLM2-135M in float32, LoRA on all blocks. The two take turns, in one process, and medians are compared; the goal is
that streaming reaches 0.9 of the speed. ``--cold``: the file's pages are dropped from the system's cache before each
block is read. Then the step is compared with the sum over blocks of max(compute, read), from the compute time of the
streamed step with a warm cache and the bandwidth of a cold read of the whole file. On Linux only.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from macft.data.batch import Batch, micro_batches
from macft.data.formats import Row
from macft.device.kind import Device
from macft.model.adapters.adapt import adapt
from macft.model.adapters.settings import AdapterConfig
from macft.model.backends.choose import make_backend
from macft.model.execution import resolve
from macft.model.fetch.bundled import ensure_bundled
from macft.model.load import LoadedModel, load
from macft.model.settings import ModelConfig
from macft.model.shape import read_weight_format
from macft.training.gradients.gradient import StepGradient
from macft.training.gradients.step_gradient import make_step_gradient

# isort: split
import mlx.core as mx
from mlx.utils import tree_flatten

GOAL = 0.9
FLOAT32 = ModelConfig(precision="float32", quantization="none")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", choices=["mlx", "cpu"], default="cpu")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=250)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--cold", action="store_true")
    arguments = parser.parse_args()
    generator = np.random.default_rng(0)
    lengths = [arguments.length] * arguments.rows
    rows = [Row(generator.integers(1, 4000, length).astype(np.int32), prompt_length=0) for length in lengths]
    batches = list(micro_batches(rows, np.arange(len(rows)), None))
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as installed:
        folder = float32_copy(Path(scratch))
        makers = {
            name: prepared(folder, arguments.kernels, installed, streamed=name == "stream")
            for name in ("memory", "stream")
        }
        loaded = makers["stream"][0]
        seconds: dict[str, list[float]] = {name: [] for name in makers}
        peaks: dict[str, int] = {}
        for step in range(arguments.steps + 1):
            for name, (_, compute) in makers.items():
                mx.reset_peak_memory()
                taken = timed(compute, step, batches)
                peaks[name] = mx.get_peak_memory()
                if step:  # the first one warms up
                    seconds[name].append(taken)
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        share = medians["memory"] / medians["stream"]
        print(f"{sum(lengths)} tokens a step, kernels={arguments.kernels}, median of {arguments.steps} steps")
        for name, value in medians.items():
            print(f"{name:8} {value:7.2f} s a step")
        print(f"streaming has {share:.3f} of the speed; goal {GOAL}: {'reached' if share >= GOAL else 'missed'}")
        weights = sum(
            int(value.nbytes) for block in loaded.model.layers for _, value in tree_flatten(block.parameters())
        )
        print(f"the blocks have {weights / 1e9:.2f} GB; both models are in this process, so peaks are not compared")
        if arguments.cold:
            compare_cold(folder / "model.safetensors", loaded, makers["stream"][1], batches, medians["stream"])


def float32_copy(folder: Path) -> Path:
    """The bundled model as float32 files, so that reading is what is measured, and not dequantising."""
    from macft.model.adapters.files import save_model

    save_model(folder / "model", load(FLOAT32, ensure_bundled()))
    return folder / "model"


def prepared(folder: Path, kernels: str, installed: ExitStack, *, streamed: bool) -> tuple[LoadedModel, StepGradient]:
    """The model in ``folder`` and what computes its gradient."""
    device = Device.default()
    execution = resolve(FLOAT32, read_weight_format(folder), device, kernels=kernels, compile="false", can_pack=True)
    execution = execution.streamed(()) if streamed else execution.with_batch(None, "blocks")
    loaded = load(FLOAT32, folder, execution)
    adaptation = adapt(loaded.model, AdapterConfig(), seed=0, streamed=loaded.streamed)
    backend = make_backend(execution)
    installed.enter_context(backend.installed(loaded.model))
    keys: Any = adaptation.dropout_keys
    compute = make_step_gradient(
        loaded.model, backend, execution, keys, loaded.streamed, seed=0, bucket_bytes=4 * 1024 * 1024
    )
    return loaded, compute


def timed(compute: StepGradient, step: int, batches: list[Batch]) -> float:
    """Seconds of a step."""
    started = time.perf_counter()
    local = compute(step, batches)
    mx.eval(local.gradient, local.losses)
    return time.perf_counter() - started


def compare_cold(file: Path, loaded: LoadedModel, compute: StepGradient, batches: list[Batch], warm: float) -> None:
    """Prints the step with a cold file beside what the formula says."""
    assert loaded.streamed is not None
    os.sync()  # dirty pages are not dropped
    bandwidth = statistics.median(read_cold(file) for _ in range(3))
    blocks = len(loaded.model.layers)
    size = sum(int(value.nbytes) for _, value in tree_flatten(loaded.model.layers[0].parameters()))
    reader = loaded.streamed.replace_reader(lambda read: dropping(file, read))
    taken = statistics.median(timed(compute, step, batches) for step in range(3))
    loaded.streamed.replace_reader(lambda _: reader)
    each = size / bandwidth
    # Forward a third of a recomputed step, backward two.
    forward, backward = warm / 3 / blocks, warm * 2 / 3 / blocks
    predicted = blocks * max(forward, each) + blocks * max(backward, each)
    print(f"cold reads: {bandwidth / 1e9:.2f} GB/s, {each * 1e3:.0f} ms a block of {size / 1e6:.1f} MB")
    print(f"cold step {taken:.2f} s, predicted {predicted:.2f} s ({taken / predicted - 1:+.0%})")


def read_cold(file: Path) -> float:
    """Bytes a second."""
    drop(file)
    started = time.perf_counter()
    with file.open("rb", buffering=0) as opened:
        while opened.read(4 << 20):
            pass
    return file.stat().st_size / (time.perf_counter() - started)


def dropping(file: Path, read: Callable[[int], list[mx.array]]) -> Callable[[int], list[mx.array]]:
    """``read`` that finds nothing of ``file`` in the cache."""

    def cold(number: int) -> list[mx.array]:
        drop(file)
        return read(number)

    return cold


def drop(file: Path) -> None:
    """Drops the file's pages from the system's cache."""
    with file.open("rb") as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    main()
