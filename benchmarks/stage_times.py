"""Seconds of a pipeline's parts on this machine: embedding, a block forward and backward, head with loss. One core.

Run by placement.py. SmolLM2-135M in float32, LoRA on all blocks, a row in each micro-batch; blocks are computed again
in the backward pass. Medians over blocks and micro-batches, but for the first of these.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from big_models import FLOAT32
from macft.data.batch import micro_batches
from macft.data.formats import Row
from macft.device.kind import Device
from macft.model.adapters.adapt import adapt
from macft.model.adapters.settings import AdapterConfig
from macft.model.backends.choose import make_backend
from macft.model.blocks.ends import BOTH_ENDS
from macft.model.execution import resolve
from macft.model.load import load
from macft.model.shape import read_weight_format
from macft.planner.placement.cluster_model import StageCost
from macft.training.gradients.staged import StagedGradient

_MICRO_BATCHES = 3


@dataclass(frozen=True)
class PartTimes:
    """Seconds of a micro-batch; ``backward`` computes the block again; ``head`` with the loss and its gradient."""

    embedding: float
    forward: float
    backward: float
    head: float

    def stages(self, counts: list[int], wire: float = 0.0) -> list[StageCost]:
        """Stages of so many blocks."""
        last = len(counts) - 1
        return [
            StageCost(
                self.embedding * (place == 0) + count * self.forward,
                count * self.backward + self.head * (place == last),
                wire * (place < last),
            )
            for place, count in enumerate(counts)
        ]


def measured_parts(folder: Path, kernels: str, length: int) -> PartTimes:
    """Of the model in ``folder``, for rows of ``length`` tokens."""
    execution = resolve(
        FLOAT32, read_weight_format(folder), Device.default(), kernels=kernels, compile="false", packing="false"
    ).pipelined(1_000)
    loaded = load(FLOAT32, folder, execution)
    adaptation = adapt(loaded.model, AdapterConfig(), seed=0, streamed=loaded.streamed)
    assert loaded.streamed is not None
    loaded.streamed.resident = range(len(loaded.model.layers))
    backend = make_backend(execution)
    generator = np.random.default_rng(0)
    rows = [Row(generator.integers(1, 4000, length).astype(np.int32), 0) for _ in range(_MICRO_BATCHES + 1)]
    seconds: dict[str, list[float]] = {"embedding": [], "forward": [], "backward": [], "head": []}
    started = 0.0

    def clock(name: str) -> None:
        nonlocal started
        seconds[name].append(time.perf_counter() - started)
        started = time.perf_counter()

    with ExitStack() as installed:
        installed.enter_context(backend.installed(loaded.model))
        whole = StagedGradient(loaded.model, backend, execution, adaptation.dropout_keys, loaded.streamed, seed=0)
        whole.staged.have_ends(BOTH_ENDS)
        loaded.model.train()
        for number, batch in enumerate(micro_batches(rows, np.arange(len(rows)), 1)):
            if number == 1:  # the first one reads the weights and warms up
                seconds = {name: [] for name in seconds}
            (work,) = whole.works(0, batch)
            blocks = range(whole.staged.count)
            started = time.perf_counter()
            whole.staged.enter(0, work)
            clock("embedding")
            for block in blocks:
                work.kept[block] = work.hidden
                with loaded.streamed.held(block):
                    whole.staged.forward(block, 0, work, training=True)
                clock("forward")
            _, work.hidden = whole.staged.loss_and_gradient(0, work)
            clock("head")
            for block in reversed(blocks):
                with loaded.streamed.held(block):
                    whole.staged.backward(block, 0, work, to_input=block > 0)
                clock("backward")
    return PartTimes(**{name: statistics.median(values) for name, values in seconds.items()})


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("folder", "kernels", "length", "rank"):
        parser.add_argument(name)
    arguments = parser.parse_args()
    print(json.dumps(asdict(measured_parts(Path(arguments.folder), arguments.kernels, int(arguments.length)))))


if __name__ == "__main__":
    main()
