"""Chaos over hundreds of steps: nodes are killed, stopped, cut off and slowed down, one after the other.

    sudo python benchmarks/chaos.py [--nodes 4] [--faults 24] [--steps 1200] [--seed 1]

Real nodes in network namespaces (Linux, root), encrypted, on a small random model, so that there are many steps; the
machinery is that of `tests/test_chaos.py`. It ends with an error if a row is lost or doubled, if the final adapter is
not that of the undisturbed run, or if a process is left. A killed node is started again and joins; the next fault comes
when all are together again.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from chaos import KINDS, TIMEOUT, Outcome, schedule, unleash, why_not
from conftest import TINY_CONFIG, make_tiny_model
from macft.model.bundled import ensure_bundled
from running import train, uneven_dataset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--faults", type=int, default=24)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    if reason := why_not():
        sys.exit(f"no chaos here: {reason}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = folder / "model"
        model.mkdir()
        make_tiny_model(model, TINY_CONFIG, ensure_bundled())
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
        done = train(*overrides, f"hydra.run.dir={folder / 'reference'}", cwd=folder, timeout=1800)
        if done.status:
            sys.exit(done.errors)
        started = time.monotonic()
        outcome = unleash(
            folder / "chaos",
            reference=folder / "reference",
            overrides=overrides,
            nodes=options.nodes,
            faults=schedule(options.faults, options.seed),
            every=max(1, options.steps // (2 * options.faults)),
            seed=options.seed,
        )
    show(outcome, options, time.monotonic() - started)


def show(outcome: Outcome, options: argparse.Namespace, seconds: float) -> None:
    """The results as a table."""
    lost = sorted(outcome.recoveries)
    middle, most = (statistics.median(lost), lost[-1]) if lost else (0.0, 0.0)
    injected = ", ".join(f"{kind} {outcome.injected[kind]}" for kind in KINDS)
    rows = [
        ("nodes, steps, seed", f"{options.nodes}, {outcome.steps}, {options.seed}"),
        ("faults injected", f"{sum(outcome.injected.values())}: {injected}"),
        ("faults survived", f"{sum(outcome.injected.values())}"),
        ("changes of the members", f"{outcome.changes}"),
        ("steps computed again", f"{outcome.recomputed}"),
        ("from a loss being found to the new ring, median, most", f"{middle:.2f} s, {most:.2f} s"),
        ("a node is lost after a silence of (`collective.timeout`)", f"{TIMEOUT:g} s"),
        ("largest difference of a step's loss", f"{outcome.worst_loss:.1e} of it"),
        ("largest difference of a final weight", f"{outcome.worst_weight:.1e}"),
        (
            "open files of a node that was never killed, at first and at the end",
            "{} and {}".format(*outcome.files),
        ),
        ("its threads", "{} and {}".format(*outcome.threads)),
        ("its memory (MB)", "{:.0f} and {:.0f}".format(*outcome.megabytes)),
        ("time (s)", f"{seconds:.0f}"),
    ]
    print("| | |\n| --- | --- |")
    for label, value in rows:
        print(f"| {label} | {value} |")


if __name__ == "__main__":
    main()
