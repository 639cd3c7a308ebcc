"""One node against two, each pinned to a core of its own: speed-up of training steps, weak and strong.

    python benchmarks/scaling.py [--link 1gbit] [--steps 10] [--rows 8] [--rounds 2]

strong: the same global batch by one node and by two; weak: twice the batch by two. SmolLM2-135M, LoRA, the SQL rows,
the trainer without reports, checkpoints and validation. ``--link`` puts the ranks into network namespaces behind cards
of that speed (Linux, root). Two lone nodes at the same time show what the machine itself loses when both cores work
(shared caches and memory, and on many servers one physical core behind two logical ones): no two nodes can be faster
than that ceiling. Times are means of the steps after the warm-up, and medians of rounds by turns.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

GOAL = 1.9
WARM_UP_STEPS = 1
NUM_LAYERS, RANK = 16, 8
LENGTH = 128


def train(rank: int, addresses: list[str], batch_size: int, steps: int, *, equal: bool) -> dict[str, Any]:
    """One rank's training; medians of a step's parts, in seconds."""
    from macft.checkpoint.saver import CheckpointSaver
    from macft.checkpoint.snapshot import Progress
    from macft.checkpoint.store import CheckpointStore
    from macft.collective.ring.ring import Ring
    from macft.collective.solo import Solo
    from macft.data.formats import Row
    from macft.data.order import RowOrder
    from macft.data.settings import SourceConfig
    from macft.data.sources import read_source
    from macft.data.tokenize import tokenize
    from macft.device.kind import Device
    from macft.model.adapters.adapt import adapt
    from macft.model.adapters.settings import AdapterConfig
    from macft.model.backends.choose import make_backend
    from macft.model.execution import resolve as resolve_execution
    from macft.model.fetch.resolve import resolve
    from macft.model.load import load, weight_format_of
    from macft.model.settings import ModelConfig
    from macft.report.events import Event, NullReporter, StepDone
    from macft.training.build_trainer import TrainingRows, build_trainer
    from macft.training.gradients.gradient import GradientComputer
    from macft.training.gradients.reducer import GradientReducer
    from macft.training.optimizer import make_optimizer
    from macft.training.settings import OptimizerConfig, TrainingConfig
    from macft.training.state import TrainState

    done: list[StepDone] = []

    class Clock(NullReporter):
        def handle(self, event: Event) -> None:
            if isinstance(event, StepDone):
                done.append(event)

    config = ModelConfig()
    loaded = load(config, resolve(config))
    records = [row.record for row in read_source(SourceConfig(path="builtin:sql"))["train"][: batch_size * steps]]
    rows = [tokenize(record, loaded.tokenizer, mask_prompt=False) for record in records]
    if equal:
        rows = [Row(np.resize(row.tokens, LENGTH), 1) for row in rows]
    adaptation = adapt(loaded.model, AdapterConfig(rank=RANK, num_layers=NUM_LAYERS), seed=0)
    optimizer = OptimizerConfig(schedule="constant")
    ring = Ring(rank, len(addresses), addresses) if len(addresses) > 1 else Solo()
    execution = resolve_execution(config, weight_format_of(loaded.model), Device.default(), can_pack=True)
    backend = make_backend(execution)
    with tempfile.TemporaryDirectory() as folder, ring as collective, backend.installed(loaded.model):
        build_trainer(
            TrainingConfig(batch_size=batch_size, steps=steps, eval_every=0, save_every=0),
            optimizer,
            TrainState(loaded.model, make_optimizer(optimizer), Progress(), GradientReducer(collective)),
            GradientComputer(loaded.model, backend, execution, adaptation.dropout_keys, seed=0),
            TrainingRows(rows, RowOrder([len(rows)], [1.0], batch_size=batch_size, seed=0)),
            CheckpointSaver(CheckpointStore(Path(folder), keep_last=1)),
            Clock(),
        ).train()
    kept = done[WARM_UP_STEPS:]
    parts = {name: statistics.median(event.parts[name] for event in kept) for name in kept[0].parts}
    return {
        # All nodes together need the same steps, so their times add up; a median would miss uneven shares.
        "seconds": statistics.fmean(event.seconds for event in kept),
        "compute_mean": statistics.fmean(event.parts["compute"] for event in kept),
        "compute_each": [event.parts["compute"] for event in kept],
        "node_tokens": [event.node_tokens for event in kept],
        "gradient_bytes": 4 * adaptation.trainable_parameters,
        **parts,
    }


def launch(
    ranks: int, batch_size: int, steps: int, *, link: str | None, alone: bool = False, equal: bool = False
) -> list[dict[str, Any]]:
    """Runs ``ranks`` processes on cores of their own and returns what each found; `alone`: each on its own."""
    from macft.collective_bench.ports import free_addresses

    try:
        from shaped_links import ShapedLinks
    except ImportError:
        link = None
    with contextlib.ExitStack() as stack:
        prefixes: Sequence[Sequence[str]] = [[] for _ in range(ranks)]
        addresses = free_addresses(ranks)
        if link and ranks > 1 and not alone:
            links = stack.enter_context(ShapedLinks(ranks, link))
            prefixes, addresses = links.prefixes, links.addresses("macft")
        cores = sorted(os.sched_getaffinity(0))
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        processes = []
        for rank in range(ranks):
            peers = addresses[:1] if alone else addresses
            task = json.dumps([0 if alone else rank, peers, batch_size, steps, equal])
            command = [*prefixes[rank], "taskset", "-c", str(cores[rank % len(cores)]), sys.executable, __file__]
            processes.append(
                subprocess.Popen([*command, "--task", task], env=environment, stdout=subprocess.PIPE, text=True)
            )
        try:
            outputs = [process.communicate(timeout=300)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
    if any(process.returncode for process in processes):
        raise SystemExit("a rank failed; see above")
    return [json.loads(output.strip().splitlines()[-1]) for output in outputs]


def report(found: dict[str, list[list[dict[str, Any]]]], options: argparse.Namespace) -> None:
    """Prints the speed-up, the machine's ceiling, where a step of two nodes goes, and all of it as JSON."""
    one, two, ceiling = (statistics.median(max(r["seconds"] for r in run) for run in found[name]) for name in found)
    first, second = last = found["two"][-1]
    name, where = "weak" if options.weak else "strong", options.link or "loopback"
    speed_up, limit = (2 if options.weak else 1) * one / two, 2 * one / ceiling
    later = statistics.fmean(max(pair) for pair in zip(first["compute_each"], second["compute_each"], strict=True))
    lengths = " of equal length" if options.equal else ""
    print(f"{name} scaling, {options.rows} rows{lengths} for one node, {where}")
    print(f"  one node {one:.3f} s/step, two nodes {two:.3f}: speed-up {speed_up:.2f} (goal {GOAL})")
    print(
        f"  two lone nodes at once {ceiling:.3f}: the machine's ceiling is {limit:.2f}, {speed_up / limit:.1%} reached"
    )
    print(f"  two nodes: compute {first['compute_mean']:.3f} and {second['compute_mean']:.3f}, the later {later:.3f}")
    waits = " and ".join(f"{r['all_reduce']:.3f}" for r in last)
    print(f"  all-reduce, waiting included, {waits}; gradient {first['gradient_bytes'] / 1e6:.1f} MB")
    point = {"name": name, "link": where, "rows": options.rows, "equal": options.equal, "one": one, "two": two}
    point |= {"ceiling": ceiling, "speed_up": speed_up, "compute": later, "gradient_bytes": first["gradient_bytes"]}
    print(json.dumps(point))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--link", help="speed of each rank's network card, 1gbit for instance; none: loopback")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rows", type=int, default=8, help="rows of the global batch of one node")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--equal", action="store_true", help=f"rows of {LENGTH} tokens each instead of the data's own")
    parser.add_argument("--weak", action="store_true", help="twice the batch on two nodes instead of the same")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        rank, addresses, batch_size, steps, equal = json.loads(options.task)
        print(json.dumps(train(rank, addresses, batch_size, steps, equal=equal)))
        return 0
    factor = 2 if options.weak else 1
    found: dict[str, list[list[dict[str, Any]]]] = {"one": [], "two": [], "ceiling": []}
    for number in range(options.rounds):
        order = ["one", "two", "ceiling"] if number % 2 == 0 else ["ceiling", "two", "one"]
        for name in order:
            if name == "two":
                result = launch(2, factor * options.rows, options.steps, link=options.link, equal=options.equal)
            else:
                ranks = 1 if name == "one" else 2
                result = launch(ranks, options.rows, options.steps, link=None, alone=True, equal=options.equal)
            found[name].append(result)
    report(found, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
