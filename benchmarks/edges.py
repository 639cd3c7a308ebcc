"""Kills of a rank at every named point of a run and at random moments: what the exit status says, and how soon.

    python benchmarks/edges.py --folder FOLDER [--runs 200] [--seed 1] [--nodes 3] [--part 0/2] [--again 7 12]

The runs take turns: `topology=local`, `topology=hosts` on this machine's loopback and, where network namespaces and
sshd can be had (Linux, root), `topology=ssh` on hosts of their own. The points come by turns; at each the leader is
killed twice as often as another rank, and a third of the runs are killed at a random moment instead. A line for each
run is appended to FOLDER/runs.jsonl as it ends, so a second call goes on, and several calls may each make a part of the
runs. --again makes single runs once more; their new lines count. The table of all is printed at the end. What the
terminals showed is in FOLDER/terminals, and the folders of runs that went wrong are left.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from harness import edges, ssh_hosts
from harness.edges import Kill, Outcome
from harness.runs import uneven_dataset
from harness.tiny_model import make_tiny_model
from macft.device.fault_points import POINTS
from macft.model.fetch.bundled import ensure_bundled

RANDOM = "a random moment"
PLACES = tuple(point for point in POINTS if point not in ("micro_batch", "reduce", "hand_over", "regroup"))
"""The points that a run of this kind comes to whose nodes are all there to its last step."""

Runner = Callable[[Path, Sequence[str], Kill], Outcome]
"""Makes a run in a folder, with overrides."""


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
    with ExitStack() as stack, tempfile.TemporaryDirectory() as hosts_folder:
        make_runs(options, folder, overrides, runners(stack, Path(hosts_folder), options.nodes))
    show(list(read(folder / "runs.jsonl").values()))


def runners(stack: ExitStack, folder: Path, nodes: int) -> dict[str, Runner]:
    """What makes a run, by topology; hosts with SSH last as long as ``stack``."""
    found: dict[str, Runner] = {
        "local": lambda folder, overrides, kill: edges.local(folder, overrides, nodes, kill),
        "hosts": lambda folder, overrides, kill: edges.hosts(folder, overrides, nodes, kill),
    }
    if reason := ssh_hosts.why_not():
        print(f"no topology=ssh: {reason}")
    else:
        cluster = stack.enter_context(ssh_hosts.cluster(folder, nodes))
        found["ssh"] = lambda folder, overrides, kill: edges.ssh(folder, overrides, cluster, kill)
    return found


def make_runs(
    options: argparse.Namespace, folder: Path, overrides: Sequence[str], topologies: dict[str, Runner]
) -> None:
    """Makes the runs that are not in the log yet, and appends them to it."""
    log = folder / "runs.jsonl"
    longest = how_long(folder, overrides, topologies)
    first, step = map(int, options.part.split("/"))
    for number in options.again or range(first, options.runs, step):
        if number in read(log) and not options.again:
            continue
        topology, kill = choose(number, options.seed, options.nodes, longest, list(topologies))
        where = folder / f"{topology}-{number}"
        shutil.rmtree(where, ignore_errors=True)
        started = time.monotonic()
        outcome = topologies[topology](where, overrides, kill)
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


def read(log: Path) -> dict[int, dict[str, Any]]:
    """The newest record of each run that has been made, by its number."""
    records = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return {record["number"]: record for record in sorted(records, key=lambda record: int(record["number"]))}


def how_long(folder: Path, overrides: Sequence[str], topologies: dict[str, Runner]) -> dict[str, float]:
    """Seconds of a run to which nothing happens, by topology; measured once."""
    path = folder / "undisturbed.json"
    if not path.exists():
        seconds = {name: seconds_of(run, folder / f"undisturbed-{name}", overrides) for name, run in topologies.items()}
        path.write_text(json.dumps(seconds))
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


def seconds_of(run: Runner, folder: Path, overrides: Sequence[str]) -> float:
    """How long a run to which nothing happens takes here."""
    shutil.rmtree(folder, ignore_errors=True)
    started = time.monotonic()
    outcome = run(folder, overrides, Kill(0, seconds=1e9))
    assert set(outcome.statuses) == {0}, outcome.output
    return time.monotonic() - started


def choose(
    number: int, seed: int, nodes: int, longest: dict[str, float], topologies: Sequence[str]
) -> tuple[str, Kill]:
    """What happens in run ``number``."""
    draw = random.Random(f"{seed}-{number}")
    turn, place = divmod(number, len(topologies))
    topology = topologies[place]
    rank = 0 if draw.random() < 2 / (nodes + 1) else draw.randrange(1, nodes)
    if turn % 3 == 2:
        return topology, Kill(rank, seconds=draw.uniform(0.5, longest[topology]))
    return topology, Kill(rank, PLACES[(turn - turn // 3) % len(PLACES)])


def show(done: Sequence[dict[str, Any]]) -> None:
    """The table: a line for each topology and point."""
    print("| topology | killed at | runs, leader | success | failure | wrong status | longest silence |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for topology in ("local", "hosts", "ssh"):
        for point in (*PLACES, RANDOM):
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
