"""Kills of a rank at every named point of a run and at random moments: what the exit status says, and how soon.

    python benchmarks/edges.py --folder FOLDER [--runs 200] [--seed 1] [--nodes 3] [--part 0/2] [--again 7 12]

Every second run is one of `topology=local`, every other one of `topology=hosts` on this machine's loopback. The points
come by turns; at each the leader is killed twice as often as another rank, and a third of the runs are killed at a
random moment instead. A line for each run is appended to FOLDER/runs.jsonl as it ends, so a second call goes on, and
several calls may each make a part of the runs. --again makes single runs once more; their new lines count. The table of
all is printed at the end. What the terminals showed is in FOLDER/terminals, and the folders of runs that went wrong are
left.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness import edges
from harness.edges import Kill
from harness.runs import uneven_dataset
from harness.tiny_model import make_tiny_model
from macft.device.fault_points import POINTS
from macft.model.bundled import ensure_bundled

RANDOM = "a random moment"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--part", default="0/1", help="K/N: every N-th run, from the K-th on")
    parser.add_argument("--again", type=int, nargs="*", default=[], help="numbers of runs to make once more")
    options = parser.parse_args()
    folder: Path = options.folder.resolve()
    overrides = prepare(folder)
    log = folder / "runs.jsonl"
    longest = how_long(folder, overrides, options.nodes)
    first, step = map(int, options.part.split("/"))
    for number in options.again or range(first, options.runs, step):
        if number in read(log) and not options.again:
            continue
        topology, kill = choose(number, options.seed, options.nodes, longest)
        where = folder / f"{topology}-{number}"
        shutil.rmtree(where, ignore_errors=True)
        started = time.monotonic()
        outcome = getattr(edges, topology)(where, overrides, options.nodes, kill)
        record = {
            "number": number,
            "topology": topology,
            "point": kill.point or RANDOM,
            "leader": kill.rank == 0,
            "statuses": outcome.statuses,
            "has_result": outcome.has_result,
            "is_right": outcome.is_right,
            "is_killed": outcome.is_killed,
            "silence": round(outcome.silence, 2),
            "after": outcome.last_line,
            "seconds": round(time.monotonic() - started, 1),
        }
        with log.open("a") as file:
            file.write(json.dumps(record) + "\n")
        if outcome.is_right and outcome.silence < 10.0:
            shutil.rmtree(where, ignore_errors=True)
        terminals = folder / "terminals"
        terminals.mkdir(exist_ok=True)
        (terminals / f"{number}.txt").write_text(outcome.output)
        print(f"{number + 1}: {record}", flush=True)
    show(list(read(log).values()))


def read(log: Path) -> dict[int, dict[str, Any]]:
    """The newest record of each run that has been made, by its number."""
    records = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return {record["number"]: record for record in sorted(records, key=lambda record: int(record["number"]))}


def how_long(folder: Path, overrides: Sequence[str], nodes: int) -> dict[str, float]:
    """Seconds of a run to which nothing happens, by topology; measured once."""
    path = folder / "undisturbed.json"
    if not path.exists():
        path.write_text(json.dumps({name: seconds_of(name, folder, overrides, nodes) for name in ("local", "hosts")}))
    return dict(json.loads(path.read_text()))


def prepare(folder: Path) -> list[str]:
    """A tiny model, rows with a metric, and the overrides for a short run of them."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "model").exists():
        make_tiny_model(folder / "model", ensure_bundled())
        uneven_dataset(folder / "data")
    return [
        f"model={folder / 'model'}",
        f"dataset={folder / 'data'}",
        "dataset.metric=exact_match",
        "training.metric_rows=3",
        "training.metric_max_tokens=4",
        "training.batch_size=6",
        "training.steps=4",
        "training.eval_every=2",
        "training.save_every=2",
        "optimizer.learning_rate=1e-3",
        "report.tensorboard=false",
        "topology.start_timeout=40",
    ]


def seconds_of(topology: str, folder: Path, overrides: Sequence[str], nodes: int) -> float:
    """How long a run to which nothing happens takes here."""
    started = time.monotonic()
    never = Kill(0, seconds=1e9)
    outcome = getattr(edges, topology)(folder / f"undisturbed-{topology}-{started:.0f}", overrides, nodes, never)
    assert set(outcome.statuses) == {0}, outcome.output
    return time.monotonic() - started


def choose(number: int, seed: int, nodes: int, longest: dict[str, float]) -> tuple[str, Kill]:
    """What happens in run ``number``."""
    draw = random.Random(f"{seed}-{number}")
    topology = "local" if number % 2 == 0 else "hosts"
    rank = 0 if draw.random() < 2 / (nodes + 1) else draw.randrange(1, nodes)
    turn = number // 2
    if turn % 3 == 2:
        return topology, Kill(rank, seconds=draw.uniform(0.5, longest[topology]))
    return topology, Kill(rank, POINTS[(turn - turn // 3) % len(POINTS)])


def show(done: Sequence[dict[str, Any]]) -> None:
    """The table: a line for each topology and point."""
    print("| topology | killed at | runs, leader | success | failure | wrong status | longest silence |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for topology in ("local", "hosts"):
        for point in (*POINTS, RANDOM):
            _show_line(f"{topology} | {point}", [r for r in done if (r["topology"], r["point"]) == (topology, point)])
    _show_line("all | ", done)


def _show_line(label: str, runs: Sequence[dict[str, Any]]) -> None:
    if not runs:
        return
    leaders = sum(run["leader"] for run in runs)
    success = sum(run["has_result"] and run["is_right"] for run in runs)
    wrong = sum(not run["is_right"] for run in runs)
    silence = max(run["silence"] for run in runs)
    failure = len(runs) - success - wrong
    print(f"| {label} | {len(runs)}, {leaders} | {success} | {failure} | {wrong} | {silence:.1f} s |")


if __name__ == "__main__":
    main()
