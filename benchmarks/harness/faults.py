"""Fault injection: nodes in network namespaces that are killed, stopped, cut off or slowed down.

The kind of a fault, its node and its step come from a seed. `tests/test_chaos.py` is a short run, `benchmarks/chaos.py`
a long one.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from harness import namespaces
from harness.namespaces import run, unique_tag
from harness.runs import Differences, differences, environment, events

KINDS = ("kill", "stop", "cut", "slow")
TIMEOUT = 3.0
_SUBNET = "10.79.{}.{}"
_LONGEST = 120.0
"""Seconds in which something has to happen."""
_MORE = 5
"""Files and threads that a node may have more at the end: it may lead now, or be about to reconnect."""


def missing_requirement() -> str:
    """Why no faults can be injected here; empty if they can."""
    return namespaces.missing_requirement(["tc"])


class Fault(NamedTuple):
    """``kind`` happens to node ``victim`` from ``step`` on; unless it is a kill it lasts ``seconds`` at most."""

    kind: str
    victim: int
    step: int
    seconds: float


def faults_of_each_kind(count: int, *, nodes: int, every: int, seed: int) -> list[Fault]:
    """``count`` faults, each kind as often as the others, one each ``every`` steps."""
    draw = random.Random(seed)
    kinds = [KINDS[number % len(KINDS)] for number in range(count)]
    draw.shuffle(kinds)
    return [_fault(kind, every * number, nodes, draw) for number, kind in enumerate(kinds, 1)]


def faults_at_random_steps(chance: float, *, nodes: int, steps: int, seed: int) -> list[Fault]:
    """At each of the first ``steps`` steps each kind with probability ``chance``."""
    draw = random.Random(seed)
    return [_fault(kind, step, nodes, draw) for step in range(3, steps) for kind in KINDS if draw.random() < chance]


def _fault(kind: str, step: int, nodes: int, draw: random.Random) -> Fault:
    # Short stops and cuts are borne, long ones make the others go on without the node.
    seconds = draw.uniform(0.5, 1.5) if kind == "slow" else draw.choice([0.5, 2.0 * TIMEOUT])
    return Fault(kind, draw.randrange(nodes), step, seconds)


class Usage(NamedTuple):
    """What a process holds."""

    files: int
    threads: int
    megabytes: float


@dataclass
class Outcome:
    """What happened in a run with faults."""

    injected: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    at_once: int = 0
    """The most faults that there were at a time."""
    steps: int = 0
    recomputed: int = 0
    recoveries: list[float] = field(default_factory=list)
    """Seconds from a loss being found to the new ring."""
    resumed: dict[str, list[float]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    """Seconds from a fault that cost a node its place to the end of the next step of the others."""
    changes: int = 0
    moves: int = 0
    """How often stages have handed over blocks."""
    usage: dict[int, list[Usage]] = field(default_factory=dict)
    """Of each process, by its id, whenever all nodes are together and nothing is wrong."""
    differences: Differences = field(default_factory=lambda: Differences(0.0, 0.0, 0.0))
    """From the run without faults."""


class At(NamedTuple):
    """How far a run is: its newest step, the generation and the number of nodes of that step, and who is in now."""

    step: int
    generation: int
    nodes: int
    members: tuple[str, ...]


class Nodes:
    """The machines, and the process on each."""

    def __init__(self, folder: Path, count: int, overrides: Sequence[str]):
        number = os.getpid() % 200 + 20
        self._tag = unique_tag()
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
            run(f"ip link add mc{self._tag} type bridge")
            stack.callback(run, f"ip link del mc{self._tag}")
            run(f"ip link set mc{self._tag} up")
            for rank, address in enumerate(self.addresses):
                inside = self._inside(rank)
                run(f"ip netns add {inside}")
                stack.callback(run, f"ip netns del {inside}")
                run(f"ip link add {self._card(rank)} type veth peer name eth0 netns {inside}")
                run(f"ip link set {self._card(rank)} master mc{self._tag} up")
                for command in (f"addr add {address}/24 dev eth0", "link set eth0 up", "link set lo up"):
                    run(f"ip -n {inside} {command}")
            subprocess.run(
                [sys.executable, "-m", "macft.keys", "make"], env=self._environment(), check=True, capture_output=True
            )
            yield

    def start_all(self) -> None:
        """The run begins."""
        self.processes = [self._start(rank) for rank in range(self.count)]

    def start_again(self, rank: int) -> None:
        """A node that was killed asks any other to be let in."""
        other = (rank + 1) % self.count
        self.processes[rank] = self._start(rank, f"topology.join={self.addresses[other]}")

    def send(self, rank: int, number: int) -> None:
        """A signal."""
        self.processes[rank].send_signal(number)

    def cut(self, rank: int, *, cut: bool) -> None:
        """Pulls a node's cable, or puts it in again."""
        run(f"ip link set {self._card(rank)} {'down' if cut else 'up'}")

    def slow(self, rank: int, *, slow: bool) -> None:
        """Makes a node's cable slow in both directions, or as it was."""
        for place in ("dev " + self._card(rank), ""):
            prefix = "tc" if place else f"tc -n {self._inside(rank)}"
            where = place or "dev eth0"
            rate = " root tbf rate 5mbit burst 32kb latency 400ms" if slow else " root"
            run(f"{prefix} qdisc {'add' if slow else 'del'} {where}{rate}")

    def events(self, kind: str) -> dict[int, list[dict[str, Any]]]:
        """Events of one kind, by node."""
        return {rank: events(self.folder / str(rank), kind) for rank in range(self.count)}

    def newest(self) -> At:
        """As far as any node tells."""
        steps, changes = (
            [found for rank in range(self.count) if (found := _last(self.folder / str(rank) / "metrics.jsonl", kind))]
            for kind in ("step_done", "nodes_changed")
        )
        step = max(steps, key=lambda event: (event["generation"], event["step"]), default=None)
        change = max(changes, key=lambda event: event["generation"], default=None)
        members = tuple(self.addresses if change is None else change["names"])
        if step is None:
            return At(0, 0, 0, members)
        return At(step["step"], step["generation"], len(step["nodes"]), members)

    def left_over(self) -> list[str]:
        """Processes that are still in a namespace."""
        return [pid for rank in range(self.count) for pid in run(f"ip netns pids {self._inside(rank)}").split()]

    def digests(self) -> list[str]:
        """Of the final adapter, as each node that came to the end tells: one in a summary, the others in a line."""
        found = []
        for folder in (self.folder / str(rank) for rank in range(self.count)):
            if (summary := folder / "summary.json").exists():
                found.append(json.loads(summary.read_text())["adapter_sha256"])
            lines = (folder / "output").read_text().splitlines()
            found += [line.split()[-1] for line in lines if line.startswith("finished; adapter sha256")]
        return found

    def _start(self, rank: int, *more: str) -> subprocess.Popen[str]:
        folder = self.folder / str(rank)
        folder.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "macft.train", *self._overrides, f"topology.rank={rank}", *more]
        with (folder / "output").open("a") as output, (folder / "errors").open("a") as errors:
            return subprocess.Popen(
                ["ip", "netns", "exec", self._inside(rank), *command, f"hydra.run.dir={folder}"],
                cwd=folder,
                env=self._environment(),
                stdout=output,
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


def train_with_faults(
    folder: Path, *, reference: Path, overrides: Sequence[str], nodes: int, faults: Sequence[Fault], one_by_one: bool
) -> Outcome:
    """Trains on ``nodes`` nodes with ``faults``, ``one_by_one`` or several at once.

    ``reference`` is the folder of the same run without faults. Raises AssertionError if a step is lost or repeated, the
    result differs, or a process is left.
    """
    settings = [f"collective.timeout={TIMEOUT}", "collective.heartbeat=0.5", *overrides]
    world = Nodes(folder, nodes, settings)
    outcome = Outcome()
    steps = len(events(reference, "step_done"))
    with world.wired():
        world.start_all()
        _await(world, lambda at: at.step >= 3, "the first steps")
        injector = _Injector(world, faults, outcome, one_by_one=one_by_one)
        _await(world, injector.is_over, "all faults had happened and all nodes were together again")
        _await(world, lambda at: at.step == steps, "the last step")
        codes = [process.wait(_LONGEST) for process in world.processes]
        assert codes == [0] * nodes, _errors(world)
        assert not world.left_over()
    _check(world, reference, outcome)
    return outcome


class _UnderWay(NamedTuple):
    fault: Fault
    since: float
    generation: int


class _Injector:
    """The faults that are to come, and those that are active, by node."""

    def __init__(self, world: Nodes, faults: Sequence[Fault], outcome: Outcome, *, one_by_one: bool):
        self._world, self._outcome, self._one_by_one = world, outcome, one_by_one
        self._waiting = list(faults)
        self._under_way: dict[int, _UnderWay] = {}

    def is_over(self, at: At) -> bool:
        """Ends faults whose time has come and begins those that are due; whether all is calm again for good."""
        for under_way in list(self._under_way.values()):
            self._end_if_due(under_way, at)
        while self._waiting and self._may_begin(self._waiting[0], at):
            self._begin(self._waiting.pop(0), at)
        if is_over := not self._waiting and self._is_calm(at):
            self._look()
        return is_over

    def _is_calm(self, at: At) -> bool:
        return not self._under_way and at.nodes == len(at.members) == self._world.count

    def _may_begin(self, fault: Fault, at: At) -> bool:
        if fault.step > at.step or fault.victim in self._under_way:
            return False
        # Who is out of touch when a node dies can't know that it did. Two who don't would wait for it for ever.
        return self._is_calm(at) if self._one_by_one or fault.kind == "kill" else True

    def _look(self) -> None:
        for process in self._world.processes:
            seen = psutil.Process(process.pid)
            usage = Usage(seen.num_fds(), seen.num_threads(), seen.memory_info().rss / 1e6)
            self._outcome.usage.setdefault(process.pid, []).append(usage)

    def _begin(self, fault: Fault, at: At) -> None:
        if self._is_calm(at):
            self._look()
        self._under_way[fault.victim] = _UnderWay(fault, time.monotonic(), at.generation)
        self._outcome.injected[fault.kind] += 1
        self._outcome.at_once = max(self._outcome.at_once, len(self._under_way))
        self._switch(fault, on=True)

    def _end_if_due(self, under_way: _UnderWay, at: At) -> None:
        fault, seconds = under_way.fault, time.monotonic() - under_way.since
        is_out = at.generation > under_way.generation and self._world.addresses[fault.victim] not in at.members
        if is_out:
            self._outcome.resumed[fault.kind].append(seconds)
        if is_out or (fault.kind != "kill" and seconds > fault.seconds):
            del self._under_way[fault.victim]
            self._switch(fault, on=False)

    def _switch(self, fault: Fault, *, on: bool) -> None:
        world, victim = self._world, fault.victim
        if fault.kind == "stop":
            world.send(victim, signal.SIGSTOP if on else signal.SIGCONT)
        elif fault.kind == "cut":
            world.cut(victim, cut=on)
        elif fault.kind == "slow":
            world.slow(victim, slow=on)
        elif on:
            world.send(victim, signal.SIGKILL)
            world.processes[victim].wait()
        else:
            world.start_again(victim)


def _await(world: Nodes, condition: Callable[[At], bool], what: str) -> None:
    """Until ``condition`` holds; the run has to get on meanwhile."""
    before: At | None = None
    deadline = 0.0
    while True:
        codes = [process.poll() for process in world.processes]
        at = world.newest()
        if at != before:
            before, deadline = at, time.monotonic() + _LONGEST
        assert {*codes} <= {None, 0, -signal.SIGKILL}, _errors(world)
        if condition(at):
            return
        assert None in codes, f"the run ended before {what}"
        assert time.monotonic() < deadline, f"until {what}: {at}\n{_errors(world)}"
        time.sleep(0.02)


def _check(world: Nodes, reference: Path, outcome: Outcome) -> None:
    """Every step is there, with the loss and the final adapter of the run without faults, and nothing has piled up."""
    told = world.events("step_done")
    for rank, steps in told.items():
        numbers = [event["step"] for event in steps]
        assert len(set(numbers)) == len(numbers), f"node {rank} tells of a step twice"
    led = [rank for rank in told if (world.folder / str(rank) / "adapters").is_dir()]
    assert len(led) == 1, led
    done = [event for steps in told.values() for event in steps]
    outcome.differences = differences(done, world.folder / str(led[0]), reference)
    digests = world.digests()
    assert len(digests) == world.count, digests
    assert len(set(digests)) == 1, "the nodes hold different adapters"
    outcome.steps = len({event["step"] for event in done})
    changes: dict[int, dict[str, Any]] = {}
    for list_of_changes in world.events("nodes_changed").values():
        changes |= {event["generation"]: event for event in list_of_changes}
    outcome.changes = len(changes)
    outcome.moves = len({event["step"] for each in world.events("blocks_moved").values() for event in each})
    outcome.recomputed = sum(event["recomputed"] for event in changes.values())
    outcome.recoveries = [event["seconds"] for event in changes.values() if event["left"]]
    assert outcome.recomputed <= outcome.changes
    for usage in outcome.usage.values():
        # The first steps and changes fill caches, and start a thread of pyzmq's with sockets of its own that stays (it
        # frees what was sent uncopied, such as a ring's goodbye); what leaks goes on growing.
        assert usage[-1].files <= usage[len(usage) // 2].files + _MORE, usage
        assert usage[-1].threads <= usage[len(usage) // 2].threads + _MORE, usage
        assert usage[-1].megabytes < 1.25 * usage[len(usage) // 2].megabytes, usage


def _last(path: Path, kind: str) -> dict[str, Any] | None:
    """The last event of a kind in a metrics.jsonl; an unfinished last line is left out."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return next((json.loads(line) for line in reversed(lines) if line.startswith(f'{{"type": "{kind}"')), None)


def _errors(world: Nodes) -> str:
    told = [f"node {rank}: {(world.folder / str(rank) / 'errors').read_text()[-3000:]}" for rank in range(world.count)]
    return re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(told))
