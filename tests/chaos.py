"""Chaos: real nodes in network namespaces, of which one after the other is killed, stopped, cut off or slowed down.

What happens when comes from a seed. `tests/test_chaos.py` runs a short form, `benchmarks/chaos.py` a long one.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from running import adapter, environment, events

KINDS = ("kill", "stop", "cut", "slow")
TIMEOUT = 3.0
_SUBNET = "10.79.{}.{}"
_LONGEST = 60.0


def why_not() -> str:
    """Why there can be no chaos here; empty if there can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "network namespaces need Linux and root"
    if missing := [name for name in ("ip", "tc") if shutil.which(name) is None]:
        return f"{missing[0]} is not installed (Debian: iproute2)"
    name = f"mt{os.getpid() % 100000}"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode:
        return "network namespaces are not permitted here"
    _run(f"ip netns del {name}")
    return ""


@dataclass
class Outcome:
    """What the chaos came to."""

    injected: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    steps: int = 0
    recomputed: int = 0
    recoveries: list[float] = field(default_factory=list)
    changes: int = 0
    # Of the node that lived longest: after the first steps and at the end.
    files: tuple[int, int] = (0, 0)
    threads: tuple[int, int] = (0, 0)
    megabytes: tuple[float, float] = (0.0, 0.0)
    worst_loss: float = 0.0
    worst_weight: float = 0.0


class Nodes:
    """The machines, and the process on each."""

    def __init__(self, folder: Path, count: int, overrides: Sequence[str]):
        number = os.getpid() % 200 + 20
        self._tag = f"{os.getpid() % 100000}"
        self.folder, self.count = folder, count
        self.addresses = [_SUBNET.format(number, rank + 1) for rank in range(count)]
        self._overrides = [*overrides, f"topology.hosts=[{','.join(self.addresses)}]", "topology=hosts"]
        self.processes: list[subprocess.Popen[str]] = []
        self._keys = folder / "keys"
        self._keys.mkdir(mode=0o700, parents=True)

    @contextmanager
    def wired(self) -> Iterator[None]:
        """All on one switch; afterwards nothing of it is left, and no process."""
        with ExitStack() as stack:
            stack.callback(self._end_all)
            _run(f"ip link add mc{self._tag} type bridge")
            stack.callback(_run, f"ip link del mc{self._tag}")
            _run(f"ip link set mc{self._tag} up")
            for rank, address in enumerate(self.addresses):
                inside = self._inside(rank)
                _run(f"ip netns add {inside}")
                stack.callback(_run, f"ip netns del {inside}")
                _run(f"ip link add {self._card(rank)} type veth peer name eth0 netns {inside}")
                _run(f"ip link set {self._card(rank)} master mc{self._tag} up")
                for command in (f"addr add {address}/24 dev eth0", "link set eth0 up", "link set lo up"):
                    _run(f"ip -n {inside} {command}")
            subprocess.run(
                [sys.executable, "-m", "macft.keys", "make"], env=self._environment(), check=True, capture_output=True
            )
            yield

    def start_all(self) -> None:
        """The run begins."""
        self.processes = [self._start(rank) for rank in range(self.count)]

    def start_again(self, rank: int) -> None:
        """A node that was killed asks any other to be let in."""
        other = next(r for r, process in enumerate(self.processes) if r != rank and process.poll() is None)
        self.processes[rank] = self._start(rank, f"topology.join={self.addresses[other]}")

    def send(self, rank: int, number: int) -> None:
        """A signal."""
        self.processes[rank].send_signal(number)

    def cut(self, rank: int, *, cut: bool) -> None:
        """Pulls a node's cable, or puts it in again."""
        _run(f"ip link set {self._card(rank)} {'down' if cut else 'up'}")

    def slow(self, rank: int, *, slow: bool) -> None:
        """Makes a node's cable slow in both directions, or as it was."""
        for place in ("dev " + self._card(rank), ""):
            prefix = "tc" if place else f"tc -n {self._inside(rank)}"
            where = place or "dev eth0"
            rate = " root tbf rate 5mbit burst 32kb latency 400ms" if slow else " root"
            _run(f"{prefix} qdisc {'add' if slow else 'del'} {where}{rate}")

    def events(self, kind: str) -> dict[int, list[dict[str, Any]]]:
        """Events of one kind, by node."""
        return {rank: events(self.folder / str(rank), kind) for rank in range(self.count)}

    def newest(self) -> tuple[int, int, int]:
        """The newest step, generation and number of nodes that any node tells of."""
        found = [event for told in self.events("step_done").values() for event in told[-1:]]
        newest = max(found, key=lambda event: (event["generation"], event["step"]), default=None)
        return (0, 0, 0) if newest is None else (newest["step"], newest["generation"], len(newest["nodes"]))

    def _start(self, rank: int, *more: str) -> subprocess.Popen[str]:
        folder = self.folder / str(rank)
        folder.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "macft.train", *self._overrides, f"topology.rank={rank}", *more]
        with (folder / "errors").open("a") as errors:
            return subprocess.Popen(
                ["ip", "netns", "exec", self._inside(rank), *command, f"hydra.run.dir={folder}"],
                cwd=folder,
                env=self._environment(),
                stdout=subprocess.DEVNULL,
                stderr=errors,
                text=True,
                start_new_session=True,
            )

    def _end_all(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()

    def _inside(self, rank: int) -> str:
        return f"mc{self._tag}n{rank}"

    def _card(self, rank: int) -> str:
        return f"mc{self._tag}c{rank}"

    def _environment(self) -> dict[str, str]:
        return {**environment(), "MACFT_KEYS": str(self._keys)}


def unleash(
    folder: Path, *, reference: Path, overrides: Sequence[str], nodes: int, faults: Sequence[str], every: int, seed: int
) -> Outcome:
    """Trains on ``nodes`` nodes while ``faults`` happen, one each ``every`` steps or when all are together again.

    ``reference`` is the folder of the same run without faults. Raises AssertionError where anything is lost, doubled,
    different or left behind.
    """
    moments = random.Random(seed)
    settings = [f"collective.timeout={TIMEOUT}", "collective.heartbeat=0.5", *overrides]
    world = Nodes(folder, nodes, settings)
    outcome = Outcome()
    with world.wired():
        world.start_all()
        _await(world, lambda at: at[0] >= 3, "the first steps")
        watched = {rank: _usage(process) for rank, process in enumerate(world.processes)}
        lived = set(watched)
        due = 3
        for kind in faults:
            due += every
            _await(world, lambda at, due=due: at[0] >= due and at[2] == nodes, "all nodes together")
            victim = moments.randrange(nodes)
            outcome.injected[kind] += 1
            _inflict(world, kind, victim, moments)
            if kind == "kill":
                lived.discard(victim)
        _await(world, lambda at: at[2] == nodes, "all nodes together")
        usage = {rank: _usage(world.processes[rank]) for rank in lived}
        codes = [process.wait(_LONGEST) for process in world.processes]
        assert codes == [0] * nodes, _errors(world)
    for rank in sorted(lived)[:1]:
        pairs = zip(watched[rank], usage[rank], strict=True)
        outcome.files, outcome.threads, outcome.megabytes = [(before, after) for before, after in pairs]  # type: ignore[assignment]
    _judge(world, reference, outcome)
    return outcome


def _inflict(world: Nodes, kind: str, victim: int, moments: random.Random) -> None:
    """One fault, and its end."""
    generation = world.newest()[1]
    if kind == "kill":
        world.send(victim, signal.SIGKILL)
        world.processes[victim].wait()
        _await(world, lambda at: at[1] > generation, "the others to go on")
        world.start_again(victim)
    elif kind == "slow":
        world.slow(victim, slow=True)
        time.sleep(moments.uniform(0.5, 1.5))
        world.slow(victim, slow=False)
    else:
        # Short ones are borne, long ones make the others go on without the node.
        seconds = moments.choice([0.5, 2.0 * TIMEOUT])
        begin, end = (signal.SIGSTOP, signal.SIGCONT) if kind == "stop" else (True, False)
        _switch(world, kind, victim, begin)
        ends = time.monotonic() + seconds
        while time.monotonic() < ends and world.newest()[1] == generation:
            time.sleep(0.05)
        _switch(world, kind, victim, end)


def _switch(world: Nodes, kind: str, victim: int, how: int | bool) -> None:
    if kind == "stop":
        world.send(victim, int(how))
    else:
        world.cut(victim, cut=bool(how))


def _await(world: Nodes, condition: Any, what: str) -> None:
    """Until ``condition`` of (step, generation, nodes) holds."""
    deadline = time.monotonic() + _LONGEST
    while not condition(world.newest()):
        codes = [process.poll() for process in world.processes]
        assert {*codes} <= {None, 0, -signal.SIGKILL}, _errors(world)
        assert None in codes, f"the run ended before {what}"
        assert time.monotonic() < deadline, f"{what}: {world.newest()}\n{_errors(world)}"
        time.sleep(0.02)


def _judge(world: Nodes, reference: Path, outcome: Outcome) -> None:
    """Every step is there, with the loss and the final adapter of the run without faults."""
    expected = {event["step"]: event for event in events(reference, "step_done")}
    told = world.events("step_done")
    for rank, steps in told.items():
        numbers = [event["step"] for event in steps]
        assert len(set(numbers)) == len(numbers), f"node {rank} tells of a step twice"
    found = {event["step"]: event for steps in told.values() for event in steps}
    assert found.keys() == expected.keys()
    for step, event in expected.items():  # a row that is lost or doubled would change the counts
        assert [found[step][key] for key in ("tokens", "target_tokens")] == [event["tokens"], event["target_tokens"]]
        difference = abs(found[step]["loss"] - event["loss"]) / event["loss"]
        outcome.worst_loss = max(outcome.worst_loss, difference)
    led = [rank for rank in told if (world.folder / str(rank) / "adapters").is_dir()]
    assert len(led) == 1, led
    ours, theirs = adapter(world.folder / str(led[0])), adapter(reference)
    assert ours.keys() == theirs.keys()
    outcome.worst_weight = max(float(np.abs(ours[name] - theirs[name]).max()) for name in ours)
    outcome.steps = len(found)
    changes: dict[int, dict[str, Any]] = {}
    for list_of_changes in world.events("nodes_changed").values():
        changes |= {event["generation"]: event for event in list_of_changes}
    outcome.changes = len(changes)
    outcome.recomputed = sum(event["recomputed"] for event in changes.values())
    outcome.recoveries = [event["seconds"] for event in changes.values() if event["left"]]


def _usage(process: subprocess.Popen[str]) -> tuple[int, int, float]:
    seen = psutil.Process(process.pid)
    return seen.num_fds(), seen.num_threads(), seen.memory_info().rss / 1e6


def _errors(world: Nodes) -> str:
    told = [f"node {rank}: {(world.folder / str(rank) / 'errors').read_text()[-3000:]}" for rank in range(world.count)]
    return re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(told))


def _run(command: str) -> None:
    done = subprocess.run(command.split(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command}: {done.stderr.strip()}")


def schedule(count: int, seed: int) -> list[str]:
    """``count`` faults, each kind as often as the others, in an order that comes from ``seed``."""
    faults = [KINDS[number % len(KINDS)] for number in range(count)]
    random.Random(seed).shuffle(faults)
    return faults


def describe(outcome: Outcome) -> str:
    """For people."""
    return json.dumps(vars(outcome), indent=1)
