"""Chaos over hundreds of steps: nodes are killed, stopped, cut off and slowed down.

    sudo python benchmarks/chaos.py [--nodes 4] [--steps 1200] [--seed 1] [--chance 0.01 | --faults 24] [--pipeline]

--pipeline: each node has some of a larger model's blocks. Simulated sensors make nodes 1 and 2 hot, so that stages hand
over blocks all through the run, while nodes are killed, stopped, cut off and slowed down.

Real nodes in network namespaces (Linux, root), encrypted, on a small random model, so that there are many steps; the
machinery is that of `tests/test_chaos.py`. --chance: at each step each of the four comes upon a random node with this
probability, whatever else is going on; only a kill waits until all are together, and what comes after it waits behind
it. --faults: so many, one by one, each when all are together again. A killed node is started again and joins.

It ends with an error if a row is lost or doubled, if the final adapter is not that of the run without faults or not the
same on all nodes, if a process is left, or if the files, threads or memory of one have grown.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from harness.families import build
from harness.faults import (
    KINDS,
    TIMEOUT,
    Outcome,
    faults_at_random_steps,
    faults_of_each_kind,
    missing_requirement,
    train_with_faults,
)
from harness.hot_nodes import hot_nodes
from harness.runs import train_to_end, uneven_dataset
from harness.tiny_model import make_tiny_model
from macft.model.fetch.bundled import ensure_bundled

PIPELINE = [
    "topology.placement=pipeline",
    "training.micro_batch_size=2",
    "thermal.simulated.blanket_seconds=400",
    *hot_nodes([1, 2]),
]
"""Nodes 1 and 2 are hot for the first ten seconds after their start."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--chance", type=float, default=0.01)
    parser.add_argument("--faults", type=int)
    parser.add_argument("--pipeline", action="store_true", help="stages of a pipeline, some of them hot")
    options = parser.parse_args()
    if reason := missing_requirement():
        sys.exit(reason)
    if options.faults is None:
        # The rest of the steps are for the last ones to come back.
        faults = faults_at_random_steps(
            options.chance, nodes=options.nodes, steps=options.steps * 3 // 4, seed=options.seed
        )
    else:
        every = max(1, options.steps // (2 * options.faults))
        faults = faults_of_each_kind(options.faults, nodes=options.nodes, every=every, seed=options.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.pipeline:
            model = build("llama", folder / "model", num_hidden_layers=2 * options.nodes)
        else:
            model = make_tiny_model(folder / "model", ensure_bundled())
        placement = PIPELINE if options.pipeline else []
        overrides = [
            f"model={model}",
            f"dataset={uneven_dataset(folder / 'data')}",
            "training.batch_size=8",
            f"training.steps={options.steps}",
            "training.eval_every=100",
            "training.save_every=50",
            "training.export=last",
            "optimizer.learning_rate=1e-4",
            "report.console=false",
            "report.tensorboard=false",
        ]
        reference = train_to_end(*overrides, folder=folder / "reference", timeout=1800)
        started = time.monotonic()
        outcome = train_with_faults(
            folder / "chaos",
            reference=reference,
            overrides=[*overrides, *placement],
            nodes=options.nodes,
            faults=faults,
            one_by_one=options.faults is not None,
        )
    show(outcome, options, time.monotonic() - started)


def show(outcome: Outcome, options: argparse.Namespace, seconds: float) -> None:
    """The results as a table."""
    injected = ", ".join(f"{kind} {outcome.injected[kind]}" for kind in KINDS)
    silent = outcome.resumed["stop"] + outcome.resumed["cut"]
    longest = max(outcome.usage.values(), key=len)
    seen = [longest[0], longest[len(longest) // 2], longest[-1]]
    files, threads, memory = (", ".join(f"{value:.0f}" for value in values) for values in zip(*seen, strict=True))
    rows = [
        ("nodes, steps, seed", f"{options.nodes}, {outcome.steps}, {options.seed}"),
        ("faults injected", f"{sum(outcome.injected.values())}: {injected}"),
        ("faults survived", f"{sum(outcome.injected.values())}"),
        ("at once, at most", f"{outcome.at_once}"),
        ("changes of the members", f"{outcome.changes}"),
        *([("times that stages handed over blocks", f"{outcome.moves}")] if options.pipeline else []),
        ("steps computed again", f"{outcome.recomputed}"),
        ("from a loss being found to the new ring, median, most", _median_and_most(outcome.recoveries)),
        ("from a kill to the others' next step's end, median, most", _median_and_most(outcome.resumed["kill"])),
        ("from a stop or cut that cost a node its place to the same", _median_and_most(silent)),
        ("a node is lost after a silence of (`collective.timeout`)", f"{TIMEOUT:g} s"),
        ("largest difference of a step's loss", f"{outcome.differences.loss:.1e} of it"),
        ("largest difference of a final weight", f"{outcome.differences.weight:.1e}"),
        ("final adapters of the nodes", "the same bits"),
        ("open files of the process that lived longest, at first, in the middle, at the end", files),
        ("its threads", threads),
        ("its memory (MB)", memory),
        ("time (s)", f"{seconds:.0f}"),
    ]
    print("| | |\n| --- | --- |")
    for label, value in rows:
        print(f"| {label} | {value} |")


def _median_and_most(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds):.2f} s, {max(seconds):.2f} s" if seconds else "there was none"


if __name__ == "__main__":
    main()
