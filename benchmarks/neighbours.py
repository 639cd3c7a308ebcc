"""Training steps beside busy processes: rows side by side, a thread each, and all threads on each product.

    python benchmarks/neighbours.py [--rows 4] [--rounds 5] [--seconds 4] [--neighbours 0 1 2]

Forms: ``lanes`` divides the rows of a step into one part for each core, and a thread computes each part alone;
``shared`` computes the rows together, and all threads take part in each matrix product. A neighbour is a process that
never sleeps. All take turns in one process: a round is each number of neighbours with each form, in turn.

``fair`` is what the scheduler leaves: with as many threads as cores, and n neighbours, the time alone of the faster
form times (threads + n) / threads. ``ratio`` is fair / measured; the goal is 0.8. ``cores`` is the processor time that
this process got a second. ``others`` are the cores that all other processes but the neighbours took meanwhile: on a
quiet machine it is about 0.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import psutil

BUSY = "import os\nparent = os.getppid()\nwhile os.getppid() == parent:\n    for _ in range(1000000): pass"


@dataclass
class Turn:
    """Of one form, beside some neighbours."""

    step_seconds: float
    cpu_seconds: float
    cores: float
    others: float


@contextmanager
def neighbours(count: int) -> Iterator[list[psutil.Process]]:
    """Inside, ``count`` processes are busy."""
    processes = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(count)]
    time.sleep(0.3)
    try:
        yield [psutil.Process(process.pid) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def cpu_seconds(*processes: psutil.Process) -> float:
    """Processor time that they have had."""
    return sum(process.cpu_times().user + process.cpu_times().system for process in processes)


def machine_seconds() -> float:
    """Processor time that all processes have had."""
    times = psutil.cpu_times()
    return float(times.user + times.system + times.nice)


class Steps:
    """Optimizer steps of SmolLM2 with LoRA on SQL rows, the same ones in each form."""

    def __init__(self, rows_a_step: int):
        import macft  # noqa: F401  # loads OpenBLAS before MLX
        from macft.data.formats import tokenize
        from macft.data.settings import SourceConfig
        from macft.data.sources import read_source
        from macft.device.kind import Device
        from macft.device.mlx_device import prepare_device
        from macft.model.adapt import adapt
        from macft.model.adapter_settings import AdapterConfig
        from macft.model.execution import resolve as resolve_execution
        from macft.model.load import load, weight_format_of
        from macft.model.resolve import resolve
        from macft.model.settings import ModelConfig

        print(prepare_device(), flush=True)
        config = ModelConfig()
        loaded = load(config, resolve(config))
        records = read_source(SourceConfig(path="builtin:sql"))["train"]
        self.rows = [tokenize(record, loaded.tokenizer, mask_prompt=True) for record in records[: 16 * rows_a_step]]
        self.rows_a_step, self.model = rows_a_step, loaded.model
        self.keys = adapt(self.model, AdapterConfig(rank=8, scale=20.0, num_layers=16), seed=0).dropout_keys
        self.execution = resolve_execution(config, weight_format_of(self.model), Device.default(), can_pack=True)

    def measure(self, form: str, seconds: float, others: list[psutil.Process]) -> Turn:
        """Steps for at least ``seconds``; one before them is not counted."""
        from macft.data.batch import micro_batches
        from macft.model.backends.choose import make_backend
        from macft.training.gradient import GradientComputer
        from macft.training.optimizer import OptimizerStep, make_optimizer
        from macft.training.settings import OptimizerConfig

        execution = self.execution if form == "lanes" else replace(self.execution, lanes=1)
        backend = make_backend(execution)
        update = OptimizerStep(self.model, make_optimizer(OptimizerConfig(learning_rate=1e-6)))
        with backend.installed(self.model):
            compute = GradientComputer(self.model, backend, execution, self.keys, seed=0)

            def step(number: int) -> None:
                ids = np.arange(number * self.rows_a_step, (number + 1) * self.rows_a_step) % len(self.rows)
                gradient = compute(number, micro_batches([self.rows[i] for i in ids], ids, None)).gradient
                update(gradient, 1e-6)

            step(0)
            me, count = psutil.Process(), 0
            machine, theirs, mine, started = (
                machine_seconds(),
                cpu_seconds(*others),
                cpu_seconds(me),
                time.perf_counter(),
            )
            while time.perf_counter() - started < seconds or count % 4:
                count += 1
                step(count)
            passed, mine = time.perf_counter() - started, cpu_seconds(me) - mine
            rest = machine_seconds() - machine - mine - (cpu_seconds(*others) - theirs)
        return Turn(passed / count, mine / count, mine / passed, rest / passed)


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4, help="rows a step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="of a turn, at least; it is four steps at least")
    parser.add_argument("--neighbours", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--forms", nargs="+", default=["lanes", "shared"], choices=["lanes", "shared"])
    options = parser.parse_args()
    steps = Steps(options.rows)
    turns: dict[tuple[int, str], list[Turn]] = {}
    for number in range(options.rounds):
        for count in options.neighbours:
            with neighbours(count) as processes:
                for form in options.forms if number % 2 == 0 else options.forms[::-1]:
                    turn = steps.measure(form, options.seconds, processes)
                    turns.setdefault((count, form), []).append(turn)
                    print(f"round {number + 1}, {count} neighbours, {form}: {turn}", file=sys.stderr, flush=True)
    report(turns, len(os.sched_getaffinity(0)))


def report(turns: dict[tuple[int, str], list[Turn]], cores: int) -> None:
    """Prints medians."""

    def median(key: tuple[int, str], field: str) -> float:
        return statistics.median(getattr(turn, field) for turn in turns[key])

    alone: Any = min((median(key, "step_seconds") for key in turns if key[0] == 0), default=float("nan"))
    print("| neighbours | form | s/step | fair | ratio | CPU s/step | cores | others |")
    print("| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for key in sorted(turns):
        seconds, fair = median(key, "step_seconds"), alone * (cores + key[0]) / cores
        rest = " | ".join(f"{median(key, field):.2f}" for field in ("cpu_seconds", "cores", "others"))
        print(f"| {key[0]} | {key[1]} | {seconds:.2f} | {fair:.2f} | {fair / seconds:.2f} | {rest} |")


if __name__ == "__main__":
    main()
