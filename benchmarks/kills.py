"""A recipe whose nodes are killed at random moments, the leader among them, until one is left.

    python benchmarks/kills.py --folder FOLDER [--recipe llama-lora] [--nodes 3] [--steps 60] [--runs 2] [--alone]

Nodes are processes on this machine. The moments come from the seed and are uniform over the run, so most are in the
middle of a step; in every second run each kill but the first follows half a second after the one before at most, while
the others may still be finding each other. It ends with an error if a row is lost or doubled, or a process is left.
--alone compares with an undisturbed run on one node too: so far apart are sums in another order. The runs are left in
FOLDER, and undisturbed ones that are there already are used again.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from harness.runs import Differences, differences, events, ranks, start, train_to_end

_LONGEST = 1800.0


@dataclass
class Kill:
    """One kill, when it was (seconds since 1970), and whether the node led."""

    name: str
    at: float
    led: bool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--recipe", default="llama-lora")
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--alone", action="store_true")
    options = parser.parse_args()
    overrides = [
        f"+recipe={options.recipe}",
        f"training.steps={options.steps}",
        "training.metric_rows=0",
        "training.eval_rows=8",
        "training.export=last",
    ]
    nodes = ["topology=local", f"topology.nodes={options.nodes}"]
    folder: Path = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    reference = undisturbed([*overrides, *nodes], folder / "reference")
    found: dict[str, Differences] = {}
    if options.alone:
        alone = undisturbed(overrides, folder / "alone")
        found["undisturbed, one node"] = differences(events(alone, "step_done"), alone, reference)
    print("| run | killed | during step | found after | new ring after | next step done after | again |")
    print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for run in range(1, options.runs + 1):
        where = folder / f"{options.seed}-{run}"
        draw = random.Random(where.name)
        moments = sorted(draw.uniform(1.0, options.steps - 1.0) for _ in range(options.nodes - 1))
        settings = [*overrides, *nodes, f"hydra.run.dir={where}"]
        kills = kill_down_to_one(settings, where, moments, draw, are_close=run % 2 == 0)
        _show_kills(run, kills, where)
        found[f"run {run}, {len(kills)} kills"] = differences(events(where, "step_done"), where, reference)
    _show_differences(found)


def undisturbed(overrides: Sequence[str], folder: Path) -> Path:
    """The run that nothing happens to, in ``folder``."""
    if not (folder / "summary.json").exists():
        train_to_end(*overrides, folder=folder, cwd=folder.parent, timeout=_LONGEST)
    return folder


def kill_down_to_one(
    overrides: Sequence[str], folder: Path, moments: Sequence[float], draw: random.Random, *, are_close: bool
) -> list[Kill]:
    """A run of which a node is killed at each of ``moments``, at least once the one that leads.

    A moment is a number of steps and a part of one. ``are_close``: all kills come with the first.
    """
    process = start(*overrides, cwd=folder.parent)
    _await(process, folder, moments[0])
    nodes = ranks(process)
    living, kills = dict(nodes), []
    leader_falls = draw.randrange(len(moments))
    for number, moment in enumerate(moments):
        if are_close and number:
            time.sleep(draw.uniform(0.0, 0.5))
        else:
            _await(process, folder, moment)
        victim = min(living) if number == leader_falls else draw.choice(sorted(living))
        kills.append(Kill(f"local-{victim}", time.time(), victim == min(living)))
        living.pop(victim).kill()
    _end(process, list(nodes.values()))
    return kills


def _await(process: subprocess.Popen[str], folder: Path, moment: float) -> None:
    while len(done := events(folder, "step_done")) < int(moment):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    time.sleep(max(0.0, done[-1]["time"] + moment % 1.0 * done[-1]["seconds"] - time.time()))


def _end(process: subprocess.Popen[str], nodes: Sequence[psutil.Process]) -> None:
    errors = process.communicate(timeout=_LONGEST)[1]
    assert process.returncode == 0, errors
    assert not psutil.wait_procs(nodes, timeout=5)[1], "a process is left"


def _show_kills(run: int, kills: Sequence[Kill], folder: Path) -> None:
    """A line each; a kill is matched with the change that tells of it."""
    steps = events(folder, "step_done")
    changes = events(folder, "nodes_changed")
    assert sorted(name for change in changes for name in change["left"]) == sorted(kill.name for kill in kills)
    for kill in kills:
        change = next(change for change in changes if kill.name in change["left"])
        found = change["time"] - change["seconds"] - kill.at
        after = next(event["time"] for event in steps if event["step"] == change["step"] + 1)
        during = 1 + sum(event["time"] < kill.at for event in steps)
        print(
            f"| {run} | {kill.name}{', leading' if kill.led else ''} | {during} | {found:.2f} s "
            f"| {change['seconds']:.2f} s | {after - kill.at:.1f} s | {'yes' if change['recomputed'] else 'no'} |",
            flush=True,
        )


def _show_differences(found: dict[str, Differences]) -> None:
    print("\n| against the undisturbed run | a step's loss | a weight | a matrix, of its norm |")
    print("| --- | --- | --- | --- |")
    for what, most in found.items():
        print(f"| {what} | {most.loss:.1e} of it | {most.weight:.1e} | {most.matrix:.1e} |")


if __name__ == "__main__":
    main()
