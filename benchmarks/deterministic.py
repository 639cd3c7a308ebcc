"""What ``training.deterministic`` costs: seconds and bytes of a step, with it and without, on one node and on two.

    python benchmarks/deterministic.py --folder FOLDER [--steps 6] [--rounds 2] [OVERRIDE ...]

Runs of SmolLM2-135M with LoRA on SQL rows take turns; nodes are processes on this machine with one BLAS thread each.
Medians of the steps but the first of each run. Overrides of macft.train can be added. The last line tells whether the
deterministic runs, on one node and on two, have the same adapter.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from harness.runs import adapter, events, same_bits, train_to_end

BASICS = (
    "+recipe=smoke",
    "training.eval_every=0",
    "training.metric_rows=0",
    "training.save_every=0",
    "training.batch_size=8",
    "training.kernels=mlx",  # what training.deterministic computes with
    "report.console=false",
    "report.tensorboard=false",
)


def main() -> None:
    """Makes the runs and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    made: dict[tuple[int, bool], list[Path]] = {}
    for number in range(options.rounds):
        for nodes in (1, 2):
            for is_exact in (False, True) if number % 2 == 0 else (True, False):
                topology = ["topology=local", f"topology.nodes={nodes}"] if nodes > 1 else ["topology=single"]
                exact = ["training.deterministic=true"] if is_exact else []
                folder = options.folder / f"{nodes}-{'exact' if is_exact else 'plain'}-{number}"
                words = [*BASICS, f"training.steps={options.steps}", *topology, *exact, *options.overrides]
                made.setdefault((nodes, is_exact), []).append(train_to_end(*words, folder=folder, timeout=900))
    print("| nodes | deterministic | s/step | of it all-reduce, s | MB sent a step |")
    print("| ---: | --- | ---: | ---: | ---: |")
    for (nodes, is_exact), folders in sorted(made.items()):
        steps = [step for folder in folders for step in events(folder, "step_done")[1:]]
        seconds, reducing, sent = (
            statistics.median(values)
            for values in (
                [step["seconds"] for step in steps],
                [step["parts"]["all_reduce"] for step in steps],
                [step["bytes_sent"] for step in steps],
            )
        )
        print(f"| {nodes} | {str(is_exact).lower()} | {seconds:.2f} | {reducing:.3f} | {sent / 1e6:.1f} |")
    first, *others = [adapter(folder) for nodes in (1, 2) for folder in made[nodes, True]]
    print(f"the deterministic runs have the same adapter: {all(same_bits(first, other) for other in others)}")


if __name__ == "__main__":
    main()
