"""Training steps beside busy processes: rows side by side, a thread each, and all threads on each product.

    python benchmarks/neighbours.py [--rows 4] [--rounds 5] [--seconds 4] [--neighbours 0 1 2]
    python benchmarks/neighbours.py --generation [--rounds 2]

Forms: ``lanes`` divides the rows of a step into one part for each core, and a thread computes each part alone;
``shared`` computes the rows together, and all threads take part in each matrix product. A neighbour is a process that
never sleeps. All take turns in one process: a round is each number of neighbours with each form, in turn.

``fair`` is what the scheduler leaves: with as many threads as cores, and n neighbours, the time alone of the faster
form times (threads + n) / threads. ``ratio`` is fair / measured; the goal is 0.8. ``cores`` is the processor time that
this process got a second. Steps in which other processes than the neighbours took more than 0.05 cores are
``disturbed`` and left out; medians of the others.

--generation measures answers instead: 16 prompts, 6 tokens each, in a process of its own for each setting of OpenBLAS:
threads that wait busily for 2^26 cycles, as OpenBLAS does by itself; for 2^4, as macft sets it; and one thread.
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


GENERATE = """
import time
import macft
from macft.data.settings import SourceConfig
from macft.data.sources import read_source
from macft.data.tokenize import prompt_tokens
from macft.device.mlx_device import prepare_device
from macft.evaluation.batched import greedy_answers
from macft.model.settings import ModelConfig
from macft.run.tuned_model import TunedModel
prepare_device()
from macft.model.backends.choose import make_backend
loaded = TunedModel.find(None, base_model=ModelConfig().path).load()
records = [row.record for row in read_source(SourceConfig(path="builtin:sql"))["train"]][:16]
prompts = [prompt_tokens(record, loaded.tokenizer) for record in records]
with make_backend(loaded.execution.padded()).installed(loaded.model):
    for count in (2, 16):
        started = time.perf_counter()
        greedy_answers(loaded.model, loaded.tokenizer, prompts[:count], max_tokens=6, progress=lambda _: None)
    print(time.perf_counter() - started)
"""
SETTINGS = {
    "2^26 cycles": {"OPENBLAS_THREAD_TIMEOUT": "26"},
    "2^4 cycles": {"OPENBLAS_THREAD_TIMEOUT": "4"},
    "one thread": {"OPENBLAS_NUM_THREADS": "1"},
}


@dataclass
class Step:
    """``cores`` are processor seconds a second; ``others`` those of all other processes but the neighbours."""

    seconds: float
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
        from macft.data.settings import SourceConfig
        from macft.data.sources import read_source
        from macft.data.tokenize import tokenize
        from macft.device.kind import Device
        from macft.device.mlx_device import prepare_device
        from macft.model.adapters.adapt import adapt
        from macft.model.adapters.settings import AdapterConfig
        from macft.model.execution import resolve as resolve_execution
        from macft.model.fetch.resolve import resolve
        from macft.model.load import load, weight_format_of
        from macft.model.settings import ModelConfig

        print(prepare_device(), flush=True)
        config = ModelConfig()
        loaded = load(config, resolve(config))
        records = [row.record for row in read_source(SourceConfig(path="builtin:sql"))["train"]]
        self.rows = [tokenize(record, loaded.tokenizer, mask_prompt=True) for record in records[: 16 * rows_a_step]]
        self.rows_a_step, self.model = rows_a_step, loaded.model
        self.keys = adapt(self.model, AdapterConfig(rank=8, scale=20.0, num_layers=16), seed=0).dropout_keys
        self.execution = resolve_execution(config, weight_format_of(self.model), Device.default(), can_pack=True)

    def measure(self, form: str, seconds: float, others: list[psutil.Process]) -> list[Step]:
        """Steps for at least ``seconds``, and two at least; one before them is not counted."""
        from macft.data.batch import micro_batches
        from macft.model.backends.choose import make_backend
        from macft.training.gradients.gradient import GradientComputer
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
            me, steps, started = psutil.Process(), list[Step](), time.perf_counter()
            while time.perf_counter() - started < seconds or len(steps) < 2:
                before = time.perf_counter(), cpu_seconds(me), cpu_seconds(*others), machine_seconds()
                step(len(steps) + 1)
                after = time.perf_counter(), cpu_seconds(me), cpu_seconds(*others), machine_seconds()
                passed, mine, theirs, machine = (end - begin for begin, end in zip(before, after, strict=True))
                steps.append(Step(passed, mine, mine / passed, (machine - mine - theirs) / passed))
        return steps


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4, help="rows a step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="of a turn, at least; it is two steps at least")
    parser.add_argument("--most-others", type=float, default=0.05, help="cores that others take in a step that counts")
    parser.add_argument("--neighbours", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--forms", nargs="+", default=["lanes", "shared"], choices=["lanes", "shared"])
    parser.add_argument("--generation", action="store_true", help="answers instead of training steps")
    options = parser.parse_args()
    if options.generation:
        measure_generation(options.rounds, options.neighbours)
        return
    training = Steps(options.rows)
    steps: dict[tuple[int, str], list[Step]] = {}
    for number in range(options.rounds):
        for count in options.neighbours:
            with neighbours(count) as processes:
                for form in options.forms if number % 2 == 0 else options.forms[::-1]:
                    found = training.measure(form, options.seconds, processes)
                    steps.setdefault((count, form), []).extend(found)
                    text = ", ".join(f"{step.seconds:.2f} ({step.others:.2f})" for step in found)
                    print(f"round {number + 1}, {count} neighbours, {form}: {text}", file=sys.stderr, flush=True)
    report(steps, len(os.sched_getaffinity(0)), options.most_others)


def measure_generation(rounds: int, counts: list[int]) -> None:
    """Prints the seconds that the answers take, each round's and their median."""
    seconds: dict[tuple[int, str], list[float]] = {}
    for number in range(rounds):
        for count in counts:
            for name in list(SETTINGS) if number % 2 == 0 else list(SETTINGS)[::-1]:
                with neighbours(count):
                    done = subprocess.run(
                        [sys.executable, "-c", GENERATE],
                        env={**os.environ, **SETTINGS[name]},
                        capture_output=True,
                        text=True,
                        check=True,
                    )
                seconds.setdefault((count, name), []).append(float(done.stdout.split()[-1]))
                print(
                    f"round {number + 1}, {count} neighbours, {name}: {done.stdout.strip()}",
                    file=sys.stderr,
                    flush=True,
                )
    print("| neighbours | OpenBLAS | s | rounds |")
    print("| ---: | --- | ---: | --- |")
    for (count, name), found in sorted(seconds.items()):
        rounds_text = ", ".join(f"{each:.1f}" for each in found)
        print(f"| {count} | {name} | {statistics.median(found):.1f} | {rounds_text} |")


def report(steps: dict[tuple[int, str], list[Step]], cores: int, most_others: float) -> None:
    """Prints medians."""
    quiet = {key: [step for step in found if step.others <= most_others] for key, found in steps.items()}

    def median(key: tuple[int, str], field: str) -> float:
        return statistics.median([getattr(step, field) for step in quiet[key]] or [float("nan")])

    alone: Any = min((median(key, "seconds") for key in steps if key[0] == 0), default=float("nan"))
    print("| neighbours | form | s/step | fair | ratio | CPU s/step | cores | steps | disturbed |")
    print("| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for key in sorted(steps):
        seconds, fair = median(key, "seconds"), alone * (cores + key[0]) / cores
        rest = " | ".join(f"{median(key, field):.2f}" for field in ("cpu_seconds", "cores"))
        count = len(quiet[key])
        print(
            f"| {key[0]} | {key[1]} | {seconds:.2f} | {fair:.2f} | {fair / seconds:.2f} | {rest} | {count} "
            f"| {len(steps[key]) - count} |"
        )


if __name__ == "__main__":
    main()
