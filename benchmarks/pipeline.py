"""Two stages of a pipeline, a core each, against one node with one core: the bubble formula, measured.

    python benchmarks/pipeline.py [--kernels cpu] [--rows 16] [--length 250] [--micro 1] [--stages 17,13] [--steps 5]
    python benchmarks/pipeline.py --link 1gbit       # each stage in a network namespace, on Linux as root
    python benchmarks/pipeline.py --link 100mbit

SmolLM2-135M in float32, LoRA on all blocks or the last --layers, blocks recomputed by both, or with --keep by none. One
node and the pipeline take turns, with the same micro-batches, and medians are compared. With m micro-batches p stages
can reach m / (m + p - 1) of the speed of p nodes; the goal is 0.9 of that. Streams are encrypted. The default cut
weighs the head as three blocks. The exchange of the gradient, which has the same size however large a step is, is
measured by itself.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from big_models import FLOAT32, float32_copy
from macft.collective.base import Collective
from macft.collective.ring.listener import Listener
from macft.collective.ring.ring import Ring
from macft.collective.settings import CollectiveConfig
from macft.collective.solo import Solo
from macft.data.batch import micro_batches
from macft.data.formats import Row
from macft.device.kind import Device
from macft.model.adapters.adapt import adapt
from macft.model.adapters.settings import AdapterConfig
from macft.model.backends.choose import make_backend
from macft.model.execution import resolve
from macft.model.load import load
from macft.model.shape import read_weight_format
from macft.parallel.stage_layout import Stage, StageLayout
from macft.parallel.stage_places import StagePlaces
from macft.training.gradients.gradient import LocalGradient, StepGradient
from macft.training.gradients.step_gradient import make_step_gradient
from ranks import hear, start, tell
from shaped_links import ShapedLinks

# isort: split
import mlx.core as mx

STAGES, GOAL = 2, 0.9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", choices=["mlx", "cpu"], default="cpu")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=250)
    parser.add_argument("--micro", type=int, default=1, help="rows in a micro-batch")
    parser.add_argument("--stages", default="17,13", help="blocks of each stage")
    parser.add_argument("--layers", type=int, default=-1, help="how many of the last blocks are adapted; -1: all")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--keep", action="store_true", help="nothing is computed again; with --kernels mlx")
    parser.add_argument("--link", help="speed of each stage's network card, such as 1gbit")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        compute_stage(arguments)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = float32_copy(Path(scratch))
        with ShapedLinks(STAGES, arguments.link) if arguments.link else nullcontext() as links:
            outside = links.prefixes if links is not None else [[]] * STAGES
            prefixes = [[*words, *one_core(core)] for core, words in enumerate(outside)]
            addresses = links.addresses("ring") if links is not None else ["127.0.0.1:0"] * STAGES
            report(arguments, measured(sys.argv[1:], prefixes, addresses, folder))


def one_core(core: int) -> list[str]:
    """Words before a command that is to have this core alone."""
    return ["env", "OPENBLAS_NUM_THREADS=1", "taskset", "--cpu-list", str(core)]


def measured(
    words: list[str], prefixes: list[list[str]], addresses: list[str], folder: Path
) -> list[dict[str, list[float]]]:
    """What each rank has measured; ``words`` are the options."""
    processes = start([__file__, *words, "--rank"], prefixes)
    try:
        for process, address in zip(processes, addresses, strict=True):
            tell(process, [address, str(folder)])
        met = [hear(process) for process in processes]
        for process in processes:
            tell(process, met)
        return [hear(process) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def report(arguments: argparse.Namespace, ranks: list[dict[str, list[float]]]) -> None:
    alone, together = (statistics.median(ranks[0][name]) for name in ("alone", "together"))
    count = -(-arguments.rows // arguments.micro)
    formula, efficiency = count / (count + STAGES - 1), alone / (STAGES * together)
    print(f"{arguments.rows} x {arguments.length} tokens a step in {count} micro-batches, kernels={arguments.kernels},")
    print(f"stages {arguments.stages}, link {arguments.link or 'loopback'}, median of {arguments.steps} steps")
    print(f"one node  {alone:7.2f} s a step")
    print(f"pipeline  {together:7.2f} s a step: efficiency {efficiency:.3f}, formula {formula:.3f}")
    share = efficiency / formula
    print(f"{share:.3f} of the formula; goal {GOAL}: {'reached' if share >= GOAL else 'missed'}")
    for rank, figures in enumerate(ranks):
        cpu, wait, wire = (statistics.median(figures[name]) for name in ("cpu", "wait", "wire"))
        print(f"stage {rank}: {cpu:.2f} s of its core, waited {wait:.2f} s, was sending for {wire:.2f} s")
    exchange = max(statistics.median(figures["exchange"]) for figures in ranks)
    print(f"exchange of the gradient: {exchange:.2f} s")


def compute_stage(arguments: argparse.Namespace) -> None:
    """One rank. The first one also computes the whole step by itself."""
    address, folder = json.loads(input())
    listener = Listener(address, CollectiveConfig(), encrypted=True)
    assert listener.security is not None
    print(json.dumps([listener.address, listener.security.public_key.hex()]), flush=True)
    met = json.loads(input())
    listener.security.meet([bytes.fromhex(key) for _, key in met], arguments.rank)
    ends = [0, *np.cumsum([int(count) for count in arguments.stages.split(",")]).tolist()]
    stages = tuple(Stage(rank, ends[rank], ends[rank + 1]) for rank in range(STAGES))
    whole = StageLayout(((Stage(0, 0, ends[-1]),),))
    generator = np.random.default_rng(0)
    rows = [Row(generator.integers(1, 4000, arguments.length).astype(np.int32), 0) for _ in range(arguments.rows)]
    batches = micro_batches(rows, np.arange(len(rows)), arguments.micro)
    addresses = [place for place, _ in met]
    with ExitStack() as stack:
        ring = stack.enter_context(Ring(arguments.rank, STAGES, addresses, listener, ring_id="benchmark"))
        together = prepared(stack, Path(folder), arguments, ring, StageLayout((stages,)))
        alone = prepared(stack, Path(folder), arguments, Solo(), whole) if arguments.rank == 0 else None
        figures: dict[str, list[float]] = {"alone": [], "together": [], "cpu": [], "wait": [], "wire": []}
        figures["exchange"] = []
        for step in range(arguments.steps + 1):
            ring.barrier()
            by_one = timed(lambda: computed(alone(step, batches)) if alone is not None else None)[0]  # noqa: B023
            ring.barrier()

            def both(step: int = step) -> LocalGradient:
                local = together(step, batches)
                ring.barrier()
                return local

            used = time.process_time()
            by_both, local = timed(both)
            used = time.process_time() - used
            exchange, _ = timed(lambda: ring.all_reduce(list(local.gradient.values())))  # noqa: B023
            if step:  # the first one warms up
                values = (by_one, by_both, used, local.waited_for_stages, local.sent_to_stages, exchange)
                for name, value in zip(figures, values, strict=True):
                    figures[name].append(float(value or 0.0))
        print(json.dumps(figures), flush=True)
        ring.barrier()


def computed(local: LocalGradient) -> LocalGradient:
    """``local``, once MLX has it."""
    mx.eval(local.gradient, local.losses)
    return local


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that ``call`` takes, and what it returns."""
    started = time.perf_counter()
    result = call()
    return time.perf_counter() - started, result


def prepared(
    stack: ExitStack, folder: Path, arguments: argparse.Namespace, collective: Collective, layout: StageLayout
) -> StepGradient:
    """What computes this rank's stage of the model in ``folder``."""
    device, kernels, blocks = Device.default(), arguments.kernels, layout.blocks_of(collective.rank)
    execution = resolve(
        FLOAT32, read_weight_format(folder), device, kernels=kernels, compile="false", can_pack=False, packing="false"
    )
    if layout.has_stages or not arguments.keep:
        execution = execution.pipelined(layout.blocks, tuple(blocks))
        room = (2 * STAGES - 1) * (layout.blocks + 1)
        execution = replace(execution, activation_capacity=room if arguments.keep else 0, border_capacity=room)
    loaded = load(FLOAT32, folder, execution)
    adaptation = adapt(loaded.model, AdapterConfig(num_layers=arguments.layers), seed=0, streamed=loaded.streamed)
    backend = make_backend(execution)
    stack.enter_context(backend.installed(loaded.model))
    places = StagePlaces(collective, lambda _: layout)
    mx.eval(loaded.model.trainable_parameters())
    keys: Any = adaptation.dropout_keys
    return make_step_gradient(
        loaded.model, backend, execution, keys, loaded.streamed, seed=0, bucket_bytes=4 * 1024 * 1024, places=places
    )


if __name__ == "__main__":
    main()
