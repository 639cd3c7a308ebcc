"""Two unequal nodes: rows shared by measured speed against rows shared equally.

    sudo python benchmarks/shares.py [--percent 40] [--steps 16] [--rows 16] [--rounds 3]

Node 0 has a core of its own, node 1 that part of another one (a cgroup's CPU quota; Linux, root). First each trains
alone: the sum of their tokens a second is what two perfect nodes would reach together. Then both train together, once
with `topology.shares=auto` and once with `equal`, by turns. SmolLM2-135M, the SQL rows, `macft.train` without
validation and checkpoints; tokens a second over the second half of the steps, when the shares have settled. Two cores
that work at once are slower than each by itself (shared caches and memory, often one physical core behind both), so
"both alone at once" is the ceiling that this machine sets.
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
from collections.abc import Callable, Iterator
from pathlib import Path

V1, V2 = Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")
PERIOD = 20_000
"""Microseconds; short, so that a node is slow rather than now fast and now stopped."""


@contextlib.contextmanager
def quota(percent: float) -> Iterator[Callable[[], None]]:
    """A cgroup with ``percent`` of a core; yields what puts the calling process in."""
    is_v2 = (V2 / "cgroup.controllers").is_file()
    group = (V2 if is_v2 else V1) / f"macft-shares-{os.getpid()}"
    allowed = int(PERIOD * percent / 100)
    try:
        group.mkdir()
        if is_v2:
            (group / "cpu.max").write_text(f"{allowed} {PERIOD}")
        else:
            (group / "cpu.cfs_period_us").write_text(str(PERIOD))
            (group / "cpu.cfs_quota_us").write_text(str(allowed))
    except OSError as error:
        sys.exit(f"a CPU quota can't be set: {error}; this needs Linux and root")

    def enter() -> None:
        (group / "cgroup.procs").write_text(str(os.getpid()))

    try:
        yield enter
    finally:
        group.rmdir()


def start(core: int, limit: Callable[[], None] | None, folder: Path, options: list[str]) -> subprocess.Popen[str]:
    """A node's process, pinned to ``core`` and put under ``limit``."""

    def prepare() -> None:
        os.sched_setaffinity(0, {core})
        if limit is not None:
            limit()

    command = [
        sys.executable,
        "-m",
        "macft.train",
        "+recipe=llama-lora",
        "training.metric_rows=0",
        "thermal=off",
        "optimizer.warmup_steps=0",
    ]
    command += ["training.eval_every=0", "training.save_every=0", "report.console=false", "report.tensorboard=false"]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, *options, f"hydra.run.dir={folder}"],
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        preexec_fn=prepare,
    )


def speed(folder: Path, steps: int) -> tuple[float, list[float]]:
    """(tokens a second over the second half of a run's steps, its last shares)."""
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    half = [event for event in events if event["type"] == "step_done" and event["step"] > steps // 2]
    return sum(event["tokens"] for event in half) / sum(event["seconds"] for event in half), half[-1]["shares"]


def finish(processes: list[subprocess.Popen[str]]) -> None:
    """Waits for all; ends the program where one failed."""
    errors = [process.communicate()[1] for process in processes]
    for process, error in zip(processes, errors, strict=True):
        if process.returncode:
            sys.exit(f"a node failed: {error[-2000:]}")


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--percent", type=float, default=40)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--port", type=int, default=17071)
    options = parser.parse_args()
    common = [f"training.steps={options.steps}", f"training.batch_size={options.rows}"]
    hosts = f"topology.hosts=[127.0.0.1:{options.port},127.0.0.1:{options.port + 10}]"
    found: dict[str, list[float]] = {}
    last_shares: list[float] = []
    with tempfile.TemporaryDirectory() as root, quota(options.percent) as slow:
        for number in range(options.rounds):
            place = Path(root) / str(number)
            for name, limit, core in (("node 0 alone", None, 0), ("node 1 alone", slow, 1)):
                finish([start(core, limit, place / name.replace(" ", "-"), common)])
                found.setdefault(name, []).append(speed(place / name.replace(" ", "-"), options.steps)[0])
            folders = [place / "at-once-0", place / "at-once-1"]
            # The fast one has more steps, so that neither ends while the other still works.
            more = [f"training.steps={round(options.steps * 100 / options.percent)}", common[1]]
            finish([start(0, None, folders[0], more), start(1, slow, folders[1], common)])
            found.setdefault("both alone at once", []).append(
                sum(speed(folder, options.steps)[0] for folder in folders)
            )
            for shares in ("auto", "equal"):
                folders = [place / f"{shares}-{rank}" for rank in range(2)]
                together = [*common, "topology=hosts", hosts, f"topology.shares={shares}"]
                nodes = [(0, None), (1, slow)]
                finish([start(core, lim, folders[core], [*together, f"topology.rank={core}"]) for core, lim in nodes])
                tokens, last = speed(folders[0], options.steps)
                found.setdefault(shares, []).append(tokens)
                last_shares = last if shares == "auto" else last_shares
    alone = [a + b for a, b in zip(found["node 0 alone"], found["node 1 alone"], strict=True)]
    print(f"| median of {options.rounds} | tokens/s | of the sum of both alone | of both alone at once |")
    print("| --- | --- | --- | --- |")
    for name, speeds in found.items():
        of_sum = statistics.median(a / b for a, b in zip(speeds, alone, strict=True))
        of_ceiling = statistics.median(a / b for a, b in zip(speeds, found["both alone at once"], strict=True))
        print(f"| {name} | {statistics.median(speeds):.1f} | {of_sum:.2f} | {of_ceiling:.2f} |")
    print(f"last shares under auto: {', '.join(f'{share:.2f}' for share in last_shares)}")


if __name__ == "__main__":
    main()
