"""How long training stands still for a checkpoint: written in the loop against written in the background.

    python benchmarks/checkpoint.py --folder /path/on/the/disk/to/measure

LoRA adapters of SmolLM2-135M and their AdamW moments. The two take turns; between two saves the loop computes, as
training does, so that the write in the background has to share the processor with it.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from macft.model.fetch.resolve import resolve
from macft.model.load import load

# isort: split
import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_map

from macft.checkpoint.saver import CheckpointSaver
from macft.checkpoint.snapshot import Progress, capture
from macft.checkpoint.store import CheckpointStore
from macft.model.adapters.adapt import adapt
from macft.model.adapters.settings import AdapterConfig
from macft.model.settings import ModelConfig

_WORK_SIZE = 1024
_WORK_SECONDS = 0.5


def work() -> int:
    """Matrix products for half a second, as the next steps would make; returns how many."""
    left, right, done = mx.random.normal((_WORK_SIZE, _WORK_SIZE)), mx.random.normal((_WORK_SIZE, _WORK_SIZE)), 0
    end = time.perf_counter() + _WORK_SECONDS
    while time.perf_counter() < end:
        mx.eval(left @ right)
        done += 1
    return done


def measure(rank: int, folder: Path, rounds: int) -> str:
    """One line of the table for LoRA of ``rank``."""
    config = ModelConfig()
    model = load(config, resolve(config)).model
    adapt(model, AdapterConfig(rank=rank, num_layers=-1), seed=0)
    optimizer = optim.AdamW(1e-4)
    optimizer.update(model, tree_map(mx.ones_like, model.trainable_parameters()))
    mx.eval(model.trainable_parameters(), optimizer.state)
    size = sum(len(data) for data in capture(model, optimizer, Progress()).files.values())
    store = CheckpointStore(folder, keep_last=2)
    saver = CheckpointSaver(store)
    in_loop, standing, writing, alone, beside = ([] for _ in range(5))
    for step in range(2 * rounds):
        progress = Progress(step=step)
        started = time.perf_counter()
        if step % 2:
            store.save(capture(model, optimizer, progress))
            in_loop.append(time.perf_counter() - started)
            alone.append(work())
        else:
            saver.begin(capture(model, optimizer, progress), since=started)
            standing.append(time.perf_counter() - started)
            beside.append(work())
            saver.wait()
            writing += [save.seconds for save in saver.news()]
    saver.close()
    ratio = statistics.median(waits / stands for waits, stands in zip(in_loop, standing, strict=True))
    middle = [statistics.median(values) * 1e3 for values in (in_loop, standing, writing)]
    slower = statistics.median(one / other for one, other in zip(beside, alone, strict=True))
    cells = [f"{rank}", f"{size / 1e6:.1f}", *(f"{value:.1f}" for value in middle), f"{ratio:.1f}", f"{slower:.2f}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(), help="on the disk to measure")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--rounds", type=int, default=11)
    arguments = parser.parse_args()
    print("| LoRA rank | MB | in the loop, ms | stands still, ms | in the background, ms | ratio | work beside it |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for rank in arguments.ranks:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            print(measure(rank, Path(folder), arguments.rounds), flush=True)


if __name__ == "__main__":
    main()
